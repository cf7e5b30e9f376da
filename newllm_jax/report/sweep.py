"""The table of a sweep: its members by their best validation perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from newllm_jax.records.directory import RunDir
from newllm_jax.report.tables import markdown_table, number


def member_row(number: int, name: str, settings: Mapping[str, Any], run: str) -> dict[str, Any]:
    """What the results of a sweep say of any member, one that failed too."""
    return {"number": number, "name": name, "settings": dict(settings), "run": run}


def finished_row(results: Mapping[str, Any]) -> dict[str, Any]:
    """What they say of a finished one beside, from its `results.json`."""
    return {
        "parameters": results["parameters"],
        "epochs": len(results["epochs"]),
        "stopped": results["stopped"],
        "best": results["best"],
        "test": results["test"],
        "val_ppl": [entry["val_ppl"] for entry in results["epochs"]],
        "epoch_seconds": [round(entry["seconds"], 3) for entry in results["epochs"]],
    }


def write_sweep_report(run: RunDir, results: dict[str, Any]) -> Path:
    """Writes `report.md`; returns its path."""
    return run.write_text("report.md", sweep_report(results))


def sweep_report(results: Mapping[str, Any]) -> str:
    """`report.md` of a sweep, from its `results.json`."""
    environment, grid = results["environment"], results["grid"]
    varied = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in grid.items()) or "nothing"
    return f"""# Sweep: {results["name"]}

{len(results["members"])} members in {results["programs"]} compiled programs. Chosen among by validation; test figures \
are of each member's best epoch on the validation split.

| | |
|---|---|
| command | `{results["command"]}` |
| grid | {varied} |
| device | {environment["device"]} ({environment["platform"]}), {environment["precision"]}, jax {environment["jax"]} |
| time, memory | {results["seconds"]:.0f} s, {results["peak_memory_bytes"] / 2**30:.2f} GiB at most |

{sweep_table(results["members"])}
"""


def sweep_table(members: list[dict[str, Any]]) -> str:
    """One line a member, the best one first, those that failed last."""
    ranked = sorted(members, key=lambda row: row["best"]["val_loss"] if "best" in row else math.inf)
    rows = [
        [
            row["name"], f"{row['parameters']:,}", str(row["best"]["epoch"]), number(row["best"]["val_ppl"]),
            number(row["test"]["ppl"]), row["run"],
        ]
        if "best" in row
        else [row["name"], "-", "-", row["failed"], "-", row["run"]]
        for row in ranked
    ]  # fmt: skip
    return markdown_table(["member", "parameters", "best epoch", "val PPL", "test PPL", "run"], rows)
