"""Terminal output of a sweep: a live table of its members, or a line per epoch where there is no terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from newllm_jax.bars import TimeLeft, is_watched, terminal
from newllm_jax.records.narration import Narrate, tell

SHOWN = 20  # members in the live table, the best ones


class Shown(Protocol):
    """A member, as far as it is shown."""

    name: str
    history: list[dict[str, Any]]
    failure: str


class SweepProgress:
    """Shows members that are trained side by side. Use it as a context."""

    def __init__(self, members: Sequence[Shown], epochs: int, narrate: Narrate = print) -> None:
        self._members, self._epochs, self._narrate = members, epochs, narrate
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeLeft()
        )
        self._task = None
        shown = {"transient": True, "redirect_stdout": sys.stdout.isatty()}  # a log file gets its lines
        self._live = Live(get_renderable=self._view, console=terminal(), **shown) if is_watched() else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def progress(self, epoch: int, done: int, steps: int) -> None:
        """Shows how far an epoch is."""
        if self._task is None:
            self._task = self._bar.add_task("", total=self._epochs * steps, completed=(epoch - 1) * steps)
        self._bar.update(self._task, completed=(epoch - 1) * steps + done, description=f"epoch {epoch}/{self._epochs}")

    def epoch(self, epoch: int, seconds: float) -> None:
        """Tells the best and the last of the members after an epoch."""
        ranked = self._ranked()
        best, last = ranked[0], ranked[-1]
        left = timedelta(seconds=round((self._epochs - epoch) * seconds))
        failed = sum(bool(member.failure) for member in self._members)
        lost = f"  {failed} failed" if failed else ""
        line = (
            f"epoch {epoch:>3}/{self._epochs}  val PPL {_figure(best)} ({best.name}) ... {_figure(last)} ({last.name})"
            f"{lost}  {seconds:.1f} s  left {left}"
        )
        entries = [
            {"name": each.name, "failure": each.failure, **(each.history[-1] if each.history else {})}
            for each in ranked
        ]
        tell(
            self._narrate,
            "epoch",
            line,
            {"epoch": epoch, "epochs": self._epochs, "seconds": seconds, "members": entries},
        )

    def _ranked(self) -> list[Shown]:
        """By the best validation loss; those without one last."""
        return sorted(self._members, key=_best_loss)

    def _view(self) -> Group:
        return Group(self._table(), self._bar)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for header in ("member", "epoch", "val PPL", "best"):
            table.add_column(header, justify="left" if header == "member" else "right")
        for member in self._ranked()[:SHOWN]:
            now = f"{member.history[-1]['val_ppl']:.2f}" if member.history else "-"
            best = "failed" if member.failure else _figure(member)
            table.add_row(Text(member.name), str(len(member.history)), now, best)
        if len(self._members) > SHOWN:
            table.add_row(f"and {len(self._members) - SHOWN} more", "", "", "")
        return table


def _best_loss(member: Shown) -> float:
    return min((entry["val_loss"] for entry in member.history), default=math.inf)


def _figure(member: Shown) -> str:
    """The best validation perplexity."""
    return f"{min(entry['val_ppl'] for entry in member.history):.2f}" if member.history else "-"
