"""Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

HUGE = 1e9  # from which on numbers are written with a power of ten


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns line up in the source too; all but the first are aligned right."""
    lines = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([row(lines[0]), "| " + " | ".join(rule) + " |", *map(row, lines[1:])])


def epoch_table(epochs: Sequence[dict[str, Any]]) -> str:
    """One line an epoch."""
    header = ["epoch", "train loss", "val loss", "val PPL", "val accuracy", "lr", "clip", "tokens/s", "seconds"]
    return markdown_table(header, [
        [
            str(entry["epoch"]), f"{entry['train_loss']:.4f}", f"{entry['val_loss']:.4f}", number(entry["val_ppl"]),
            f"{entry['val_accuracy']:.1%}", f"{entry['learning_rate']:.2g}", _clip(entry["clip_norm"]),
            f"{entry['tokens_per_second']:,.0f}", f"{entry['seconds']:.1f}",
        ]
        for entry in epochs
    ])  # fmt: skip


def _clip(bound: float | None) -> str:
    return "-" if bound is None else f"{bound:g}"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none; a huge one, as perplexities can be, by its power of ten."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < HUGE else f"{value:.{digits}e}"


def json_text(results: Any) -> str:
    """Results as indented JSON."""
    return json.dumps(results, indent=2)
