"""The tables of criteria and of designs of CASCADE: `docs/results/cascade/hardness.json` and `ablation.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.subjects.designs import ABLATION
from benchmarks.tables import files
from benchmarks.tables.experiments import NONE_YET, shown
from newllm_jax.report.criteria import criteria_table
from newllm_jax.report.tables import markdown_table, number
from newllm_jax.training.losses import perplexity

CURVE = "validation criterion"
COSTS = (1.3, 1.5)  # passes of the base, at which designs are compared
SEARCHED = (0.8, 0.85, 1.3, 1.57)
TOLD = ("entry_layer", "skipped_layers", "short_head", "short_rank", "skip_rank", "rank", "learning_rate", "batch_size",
        "hard_ratio")  # fmt: skip

Point = dict[str, Any]


def ablation_table() -> str:
    """What each choice of the recipe of re-entry is worth: a row for each design, in the order of the ablation."""
    results = _read("ablation")
    if results is None:
        return NONE_YET
    header = ["design", "what differs", "trained parameters", "val PPL, all on the hard path", "its FLOPs, passes",
              *(f"val PPL at {cost:g} passes" for cost in COSTS)]  # fmt: skip
    found = results["designs"]
    unknown = found.keys() - ABLATION.keys()
    if unknown:
        raise ValueError(f"ablation.json: not in the ablation of benchmarks/subjects/designs.py: {sorted(unknown)}")
    return markdown_table(header, [_design_row(name, found[name]) for name in ABLATION if name in found])


def search_table() -> str:
    """The designs that were tried for the recipes: their settings, and their perplexities at the costs asked for."""
    results = _read("search")
    if results is None:
        return NONE_YET
    header = ["design", "settings", "trained parameters", "easy, hard path: passes",
              *(f"val PPL at {cost:g}" for cost in SEARCHED)]  # fmt: skip
    rows = []
    for name, found in sorted(results["designs"].items()):
        config, paths, points = found["config"], found["stages"][0]["path_flops"], found["curves"][CURVE]
        told = ", ".join(f"{key}={_value(config[key])}" for key in TOLD if config.get(key))
        rows.append([
            name, told, f"{found['stages'][0]['stage_parameters']:,}", f"{paths['easy']:.2f}, {paths['hard']:.2f}",
            *(number(ppl_at(points, cost)) for cost in SEARCHED),
        ])  # fmt: skip
    return markdown_table(header, rows)


def hardness_table() -> str:
    """How well each criterion tells hard tokens."""
    results = _read("hardness")
    return NONE_YET if results is None else criteria_table(results)


def ppl_at(points: Sequence[Point], cost: float) -> float | None:
    """The perplexity of a curve at a cost, its loss interpolated linearly; None where the design never costs that."""
    ordered = sorted(points, key=lambda point: point["flops"])
    for below, above in pairwise(ordered):
        if below["flops"] <= cost <= above["flops"]:
            step = above["flops"] - below["flops"]
            share = (cost - below["flops"]) / step if step else 0.0
            return perplexity(below["loss"] + share * (above["loss"] - below["loss"]))
    return None


def _design_row(name: str, results: dict[str, Any]) -> list[str]:
    points = results["curves"][CURVE]
    everywhere = max(points, key=lambda point: point["hard_share"])
    if everywhere["hard_share"] < 0.99:  # a threshold from other tokens may leave one out
        raise ValueError(f"ablation.json: the curve of {name} has no point where all tokens take the hard path")
    differs = ", ".join(f"{setting}={_value(value)}" for setting, value in ABLATION[name].items())
    return [
        name, differs or "-", f"{results['stages'][0]['stage_parameters']:,}",
        number(everywhere["ppl"]), number(everywhere["flops"]), *(number(ppl_at(points, cost)) for cost in COSTS),
    ]  # fmt: skip


def _value(value: Any) -> str:
    return "none" if value is None else shown(value)


def _read(name: str) -> dict[str, Any] | None:
    """A file of `docs/results/cascade`; None where there is none yet."""
    path = f"cascade/{name}.json"
    return files.load(path) if (files.RESULTS / path).exists() else None


DESIGN_TABLES: dict[str, Callable[[], str]] = {
    "cascade ablation": ablation_table,
    "cascade hardness": hardness_table,
    "cascade search": search_table,
}
