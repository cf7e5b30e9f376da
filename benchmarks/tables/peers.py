"""The tables of the searches over peers, `docs/results/peers`: what was found, and every setting that was tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.subjects.peer_config import PeerConfig
from newllm_jax.report.tables import markdown_table

Results = dict[str, Any]


def peer_table(searches: Iterable[Results]) -> str:
    """What every search found: its final runs, a figure a seed."""
    rows = []
    for found in searches:
        trained = [row for row in found["trials"] if "error" not in row]
        final = [row for row in found["final"] if "error" not in row]
        if not trained:
            rows.append([found["kind"], "-", str(len(found["trials"])), "-", "-", "-"])
            continue
        best = (final or [min(trained, key=_val_loss)])[0]
        rows.append([
            PeerConfig(**best["settings"]).title, f"{best['parameters']:,}", str(len(found["trials"])),
            _each([row["best"]["val_ppl"] for row in final]), _each([row["test"]["ppl"] for row in final]),
            str(best["settings"]["epochs"]) if final else "-",
        ])  # fmt: skip
    return markdown_table(
        ["peer", "parameters", "settings tried", "val PPL (seeds)", "test PPL (seeds)", "epochs"], rows
    )


def trial_table(found: Results) -> str:
    """All trials of a search, best first; of the settings those that differ between them."""
    trials = found["trials"]
    names = [name for name in PeerConfig().to_dict() if len({str(row["settings"][name]) for row in trials}) > 1]
    trained = sorted((row for row in trials if "error" not in row), key=_val_loss)
    rows = [
        [*_cells(row, names), f"{row['best']['val_ppl']:.2f}", f"{row['best']['epoch']} of {len(row['epochs'])}",
         f"{row['seconds']:.0f} s"] for row in trained
    ]  # fmt: skip
    rows += [[*_cells(row, names), row["error"], "-", "-"] for row in trials if "error" in row]
    return markdown_table([*(name.replace("_", " ") for name in names), "val PPL", "best epoch", "took"], rows)


def peer_tables(files: dict[str, Results]) -> dict[str, Callable[[], str]]:
    """For the pages: `peers TASK` of all searches in a task, and `peer trials STEM` of every file."""
    of_tasks = {
        f"peers {task}": (lambda task=task: peer_table(found for found in files.values() if found["task"] == task))
        for task in ("words", "wikitext2")
    }
    return of_tasks | {f"peer trials {stem}": (lambda found=found: trial_table(found)) for stem, found in files.items()}


def _cells(row: Results, names: list[str]) -> list[str]:
    return [f"{value:g}" if isinstance(value := row["settings"][name], float) else str(value) for name in names]


def _val_loss(row: Results) -> float:
    return row["best"]["val_loss"]


def _each(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values) or "-"
