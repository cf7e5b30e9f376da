"""The live table of the last epochs: as many columns as the terminal has room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

COLUMNS = {  # by header, the most important first: how its value is written, and how wide it is
    "epoch": ("{epoch}", 6),
    "val PPL": ("{val_ppl:,.2f}", 10),
    "val loss": ("{val_loss:.4f}", 10),
    "train loss": ("{train_loss:.4f}", 12),
    "accuracy": ("{val_accuracy:.1%}", 10),
    "tokens/s": ("{tokens_per_second:,.0f}", 12),
    "seconds": ("{seconds:.1f}", 9),
}


class EpochLine(NamedTuple):
    """An epoch of the table.

    Attributes:
      entry: its metrics.
      text: its line, for the time after the table.
      is_best: whether its validation loss was the lowest by then.
    """

    entry: dict[str, Any]
    text: str
    is_best: bool


def epoch_table(lines: Sequence[EpochLine], width: int) -> Table:
    """The epochs, those that were the best by then marked, in `width` columns of a terminal."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 2, 0, 0))
    room, shown = width - 2, list[str]()
    for header, (form, wide) in COLUMNS.items():
        room -= wide + 1
        if shown and room < 0:
            break
        table.add_column(header, justify="right", no_wrap=True)
        shown.append(form)
    table.add_column("", no_wrap=True)
    for entry, _, is_best in lines:
        cells = [form.format(**entry) for form in shown]
        table.add_row(*cells, "*" if is_best else "", style="bold green" if is_best else None)
    return table
