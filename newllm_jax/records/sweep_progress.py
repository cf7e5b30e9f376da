"""Terminal output of a sweep: a live table of its members, or a line per epoch where there is no terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

SHOWN = 20  # members in the live table, the best ones


class Shown(Protocol):
    """A member, as far as it is shown."""

    name: str
    history: list[dict[str, Any]]
    failure: str


class SweepProgress:
    """Shows members that are trained side by side. Use it as a context."""

    def __init__(self, members: Sequence[Shown], epochs: int) -> None:
        self._members, self._epochs = members, epochs
        self._place = ""
        console = Console(file=sys.stderr)
        shown = {"transient": True, "redirect_stdout": sys.stdout.isatty()}  # a log file gets its lines
        self._live = Live(self._table(), console=console, **shown) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def progress(self, epoch: int, done: int, steps: int) -> None:
        """Shows how far an epoch is."""
        self._place = f"epoch {epoch}/{self._epochs}, update {done}/{steps}"
        if self._live:
            self._live.update(self._table())

    def epoch(self, epoch: int, seconds: float) -> None:
        """Prints the best and the last of the members after an epoch."""
        ranked = self._ranked()
        best, last = ranked[0], ranked[-1]
        left = timedelta(seconds=round((self._epochs - epoch) * seconds))
        failed = sum(bool(member.failure) for member in self._members)
        lost = f"  {failed} failed" if failed else ""
        print(
            f"epoch {epoch:>3}/{self._epochs}  val PPL {_figure(best)} ({best.name}) ... {_figure(last)} ({last.name})"
            f"{lost}  {seconds:.1f} s  left {left}",
            flush=True,
        )

    def _ranked(self) -> list[Shown]:
        """By the best validation loss; those without one last."""
        return sorted(self._members, key=_best_loss)

    def _table(self) -> Table:
        table = Table(title=self._place or None, title_justify="left")
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
