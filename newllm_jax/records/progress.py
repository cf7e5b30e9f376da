"""Terminal output of a run: its resolved settings, a progress bar, a line per epoch, a live table of the last ones."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from newllm_jax.bars import TimeLeft, is_watched, terminal
from newllm_jax.config import check
from newllm_jax.processes import is_first
from newllm_jax.records.directory import RunDir
from newllm_jax.records.epoch_table import EpochLine, epoch_table
from newllm_jax.records.narration import Narrate, tell, warn
from newllm_jax.records.trackers import Tracker

SHOWN = 8  # epochs in the live table, the last ones


def narrate_start(
    narrate: Narrate, run: RunDir, precision: str, facts: Mapping[str, str | int], warnings: Iterable[str] = ()
) -> None:
    """Tells what a run resolved.

    Args:
      facts: lines of a name and what was resolved: data, base model, parameters.
      warnings: told first, each in a box; empty ones are left out.
    """
    narrate_facts(narrate, precision, {**facts, "run": str(run.path)}, warnings)


def narrate_facts(
    narrate: Narrate, precision: str, facts: Mapping[str, str | int], warnings: Iterable[str] = ()
) -> None:
    """`narrate_start` of a command without a run directory."""
    import jax

    check("narrate", narrate, "a function that takes a line", callable(narrate))
    device = jax.devices()[0]
    for warning in filter(None, warnings):
        warn(narrate, warning)
    facts = {"device": f"{device.device_kind} ({device.platform}), {precision}", **facts}
    tell(
        narrate,
        "start",
        [f"{name:<11} {fact:,}" if isinstance(fact, int) else f"{name:<11} {fact}" for name, fact in facts.items()],
        facts,
    )


class TrainingProgress:
    """Tells, and writes to `metrics.jsonl` and the trackers, the epochs as they go by. Use it as a context.

    On a terminal the last epochs are a live table above the bar. Their lines follow when they leave it, so that in the
    end the terminal has the line of every epoch, like a file to which it is redirected.
    """

    def __init__(
        self,
        run: RunDir,
        tracker: Tracker,
        epochs: int,
        history: Sequence[dict[str, Any]] = (),
        stage: int | None = None,
        epochs_before: int = 0,
        narrate: Narrate = print,
    ) -> None:
        """`stage`: of several trainings of a run, which one this is; `epochs_before`: epochs of those before it."""
        self._run, self._tracker, self._epochs, self._narrate = run, tracker, epochs, narrate
        self._stage, self._epochs_before = stage, epochs_before
        self._label = "" if stage is None else f"stage {stage}  "
        self._best = min((entry["val_loss"] for entry in history), default=math.inf)
        self._bar = Progress(
            TextColumn("{task.fields[epoch]}"),
            BarColumn(bar_width=10),  # all of it fits into 80 columns
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            TimeLeft(),
        )
        self._task = None
        self._lines = list[EpochLine]()  # of the table
        # A function of the caller's gets each line at once; and where stdout is a file, the lines go there.
        self._has_table = narrate is print and sys.stdout.isatty()
        self._live = None
        if is_watched():
            console, shown = terminal(), {"transient": True, "redirect_stdout": sys.stdout.isatty()}
            self._live = Live(get_renderable=self._view, console=console, refresh_per_second=4, **shown)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        lines, self._lines = self._lines, []
        for line in lines:
            self._narrate(line.text)
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
        """Tells and writes one epoch."""
        is_best = entry["val_loss"] < self._best
        self._best = min(self._best, entry["val_loss"])
        if is_first():
            self._tell(entry, is_best)
        if self._stage is None:
            self._run.append_metrics(entry)
            self._tracker.log(entry)
            return
        self._run.append_metrics({"stage": self._stage, **entry})
        named = {f"stage_{self._stage}/{name}": value for name, value in entry.items() if name != "epoch"}
        self._tracker.log({"epoch": self._epochs_before + entry["epoch"], **named})

    def profiled(self, folder: str, updates: int) -> None:
        """Tells where a trace is, and how it is opened."""
        how = f"tensorboard --logdir {folder}, or its *.trace.json.gz in ui.perfetto.dev"
        line = f"profile     {updates} updates: {how}"
        tell(self._narrate, "profile", line, {"folder": folder, "updates": updates})

    def _tell(self, entry: dict[str, Any], is_best: bool) -> None:
        left = timedelta(seconds=round((self._epochs - entry["epoch"]) * entry["seconds"]))
        line = (
            f"{self._label}epoch {entry['epoch']:>3}/{self._epochs}  train loss {entry['train_loss']:.4f}  "
            f"val loss {entry['val_loss']:.4f}  val PPL {entry['val_ppl']:.2f}  accuracy {entry['val_accuracy']:.1%}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s  {entry['seconds']:.1f} s  "
            f"left {left}{' *' if is_best else ''}"
        )
        if self._live and self._has_table:
            self._lines.append(EpochLine(entry, line, is_best))
            if len(self._lines) > SHOWN:
                self._narrate(self._lines.pop(0).text)
            return
        stage = {} if self._stage is None else {"stage": self._stage}
        tell(self._narrate, "epoch", line, {**stage, **entry, "epochs": self._epochs, "is_best": is_best})

    def _view(self) -> RenderableType:
        """The table and the bar, as wide as the terminal is by now."""
        return Group(epoch_table(self._lines, terminal().width), self._bar) if self._lines else self._bar
