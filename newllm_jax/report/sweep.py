"""The table of a sweep: its members by their best validation perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from newllm_jax.records.directory import RunDir
from newllm_jax.report.curves import label, line, logarithmic, series
from newllm_jax.report.markup import escaped
from newllm_jax.report.pages import CURVES, ending_text, write_pages
from newllm_jax.report.plots import MUTED, SERIES, Axes, Drawing
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
    """Writes `curves.png`, `report.md` and `report.html`; returns the path of `report.md`."""
    drawings = sweep_drawings(results["members"])
    return write_pages(run.path, "report", sweep_report(results), CURVES, drawings, results)


def sweep_drawings(members: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """Validation perplexity by epoch: the best members in colours, the others in grey. None where all have failed."""
    finished = sorted((row for row in members if "best" in row), key=lambda row: row["best"]["val_loss"])

    def curves(axes: Axes) -> None:
        for place, row in reversed([*enumerate(finished)]):
            epochs = [{"epoch": epoch, "val_ppl": ppl} for epoch, ppl in enumerate(row["val_ppl"], 1)]
            if place < len(SERIES):
                line(axes, epochs, "val_ppl", place, label(row["name"]))
            else:
                axes.plot(range(1, len(epochs) + 1), series(epochs, "val_ppl"), color=MUTED, linewidth=0.6, label="_")
        logarithmic(axes, [ppl for row in finished for ppl in row["val_ppl"]])
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], names[::-1], title="best first", title_fontsize=9)

    return [Drawing("Validation perplexity by member", curves)] if finished else []


def _programs(count: int) -> str:
    return "one compiled program" if count == 1 else f"{count} compiled programs"


def sweep_report(results: Mapping[str, Any]) -> str:
    """`report.md` of a sweep, from its `results.json`."""
    grid, members = results["grid"], results["members"]
    varied = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in grid.items()) or "nothing"
    picture = f"![validation perplexity of the members]({CURVES})\n\n" if sweep_drawings(members) else ""
    return f"""# Sweep: {escaped(results["name"])}

{len(members)} members in {_programs(results["programs"])}. Chosen among by validation; test figures \
are of each member's best epoch on the validation split.

Varied: {escaped(varied)}.

{picture}## Members

{sweep_table(members)}

{ending_text(results)}"""


def sweep_table(members: list[dict[str, Any]]) -> str:
    """One line a member, the best one first, those that failed last."""
    ranked = sorted(members, key=lambda row: row["best"]["val_loss"] if "best" in row else math.inf)
    rows = [
        [
            escaped(row["name"]), f"{row['parameters']:,}", str(row["best"]["epoch"]), number(row["best"]["val_ppl"]),
            number(row["test"]["ppl"]), escaped(row["run"]),
        ]
        if "best" in row
        else [escaped(row["name"]), "-", "-", escaped(row["failed"]), "-", escaped(row["run"])]
        for row in ranked
    ]  # fmt: skip
    return markdown_table(["member", "parameters", "best epoch", "val PPL", "test PPL", "run"], rows)
