"""Progress bars: how far long work is and how long it still takes, on a terminal only."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

from newllm_jax.processes import is_first

EVERY = 256  # items between two moves by `Counted`: one by one a bar would cost more than reading them

Item = TypeVar("Item")

_shown: Progress | None = None  # bars within a bar stand under it; there is one display


class TimeLeft(ProgressColumn):
    """The time that is left; of work of unknown size the time so far."""

    max_refresh = 0.5  # seconds

    def render(self, task: Task) -> Text:
        """`0:01:20 left`."""
        seconds, word = (task.elapsed, "so far") if task.total is None else (task.time_remaining, "left")
        return Text("" if seconds is None else f"{timedelta(seconds=int(seconds))} {word}", style="cyan")


def terminal() -> Console:
    """The console of bars and live tables: stderr, so that a pipe of stdout holds lines only."""
    return Console(file=sys.stderr)


def is_watched() -> bool:
    """Whether somebody sees the bars of this process: the first one, on a terminal."""
    return sys.stderr.isatty() and is_first()


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; yields the function that advances it. A total of 0 is not known."""
    global _shown
    outer = _shown  # where there is one, stderr is what Rich put in its place, of which old ones say it is no terminal
    if not (outer or is_watched()) or threading.current_thread() is not threading.main_thread():
        yield lambda done: None
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeLeft()
    # Where stdout is a file, its lines go there rather than above the bar.
    bar = outer or Progress(*columns, console=terminal(), transient=True, redirect_stdout=sys.stdout.isatty())
    task = bar.add_task(what, total=total or None)
    try:
        if outer is None:
            _shown = bar
            bar.start()
        yield lambda done: bar.advance(task, done)
    finally:
        bar.remove_task(task)
        if outer is None:
            _shown = None
            bar.stop()


@contextmanager
def no_bar() -> Iterator[None]:
    """Hides the bars while others draw theirs: the Hub's library, of its downloads."""
    bar = _shown
    if bar is None:
        yield
        return
    bar.stop()
    try:
        yield
    finally:
        bar.start()


@dataclass(frozen=True)
class Counted(Iterable[Item]):
    """Items that move a bar while they are iterated, each time anew."""

    items: Iterable[Item]
    advance: Callable[[int], None]

    def __iter__(self) -> Iterator[Item]:
        seen = 0
        for seen, item in enumerate(self.items, 1):
            yield item
            if seen % EVERY == 0:
                self.advance(EVERY)
        self.advance(seen % EVERY)
