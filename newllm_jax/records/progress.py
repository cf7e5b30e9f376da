"""Terminal output of a run: its resolved settings, a progress bar, a line per epoch."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from newllm_jax.config import check
from newllm_jax.processes import is_first
from newllm_jax.records.directory import RunDir
from newllm_jax.records.trackers import Tracker

Narrate: TypeAlias = Callable[[str], None]  # takes a line that tells what a run does


def narrate_start(
    narrate: Narrate, run: RunDir, precision: str, facts: Mapping[str, str], warnings: Iterable[str] = ()
) -> None:
    """Tells what a run resolved.

    Args:
      facts: lines of a name and what was resolved: data, base model, parameters.
      warnings: told first, each in a box; empty ones are left out.
    """
    import jax

    check("narrate", narrate, "a function that takes a line", callable(narrate))
    device = jax.devices()[0]
    for warning in filter(None, warnings):
        narrate(boxed(warning))
    device_line = {"device": f"{device.device_kind} ({device.platform}), {precision}"}
    for name, fact in {**device_line, **facts, "run": str(run.path)}.items():
        narrate(f"{name:<11} {fact}")


def boxed(text: str, width: int = 96) -> str:
    """A warning that cannot be overlooked."""
    rule = "+" + "-" * (width + 2) + "+"
    return "\n".join([rule, *(f"| {line:<{width}} |" for line in textwrap.wrap(text, width)), rule])


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, on a terminal only; yields the function that advances it."""
    columns = TextColumn(what), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn()
    console = Console(file=sys.stderr)
    shown = {"transient": True, "redirect_stdout": sys.stdout.isatty(), "disable": not sys.stderr.isatty()}
    with Progress(*columns, console=console, **shown) as bar:
        task = bar.add_task("", total=total or None)
        yield lambda done: bar.advance(task, done)


class TrainingProgress:
    """Prints, and writes `metrics.jsonl` and the trackers, as the epochs go by. Use it as a context."""

    def __init__(
        self,
        run: RunDir,
        tracker: Tracker,
        epochs: int,
        history: Sequence[dict[str, Any]] = (),
        stage: int | None = None,
        epochs_before: int = 0,
    ) -> None:
        """`stage`: of several trainings of a run, which one this is; `epochs_before`: epochs of those before it."""
        self._run, self._tracker, self._epochs = run, tracker, epochs
        self._stage, self._epochs_before = stage, epochs_before
        self._label = "" if stage is None else f"stage {stage}  "
        self._best = min((entry["val_loss"] for entry in history), default=math.inf)
        self._bar = Progress(
            TextColumn("{task.fields[epoch]}"),
            BarColumn(bar_width=10),  # all of it fits into 80 columns
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(file=sys.stderr),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # a log file gets its lines
            disable=not sys.stderr.isatty() or not is_first(),
        )
        self._task = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._tracker.close()

    def progress(self, epoch: int, done: int, steps: int, loss: float, tokens_per_second: float) -> None:
        """Moves the bar. The time left is that of the whole run."""
        if self._task is None:
            done_before = (epoch - 1) * steps
            self._task = self._bar.add_task("", total=self._epochs * steps, completed=done_before, epoch="", status="")
        status = f"loss {loss:.3f} PPL {math.exp(min(loss, 700)):.2f} {tokens_per_second:,.0f} tok/s"
        place = f"{self._label}epoch {epoch}/{self._epochs}"
        self._bar.update(self._task, completed=(epoch - 1) * steps + done, epoch=place, status=status)

    def epoch(self, entry: dict[str, Any]) -> None:
        """Prints and writes one epoch."""
        mark = " *" if entry["val_loss"] < self._best else ""
        self._best = min(self._best, entry["val_loss"])
        left = timedelta(seconds=round((self._epochs - entry["epoch"]) * entry["seconds"]))
        line = (
            f"{self._label}epoch {entry['epoch']:>3}/{self._epochs}  train loss {entry['train_loss']:.4f}  "
            f"val loss {entry['val_loss']:.4f}  val PPL {entry['val_ppl']:.2f}  accuracy {entry['val_accuracy']:.1%}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s  {entry['seconds']:.1f} s  "
            f"left {left}{mark}"
        )
        if is_first():
            print(line, flush=True)
        if self._stage is None:
            self._run.append_metrics(entry)
            self._tracker.log(entry)
            return
        self._run.append_metrics({"stage": self._stage, **entry})
        named = {f"stage_{self._stage}/{name}": value for name, value in entry.items() if name != "epoch"}
        self._tracker.log({"epoch": self._epochs_before + entry["epoch"], **named})
