"""Several runs beside one another: what they reached over all tokens, their curves, stages, ensembles and sources."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from newllm_jax.config import checked_path
from newllm_jax.errors import InputError, shown
from newllm_jax.records.directory import RunDir, read_sealed
from newllm_jax.records.shape import check_results
from newllm_jax.report.cascade_drawings import compared_ensembles
from newllm_jax.report.cascade_tables import configuration_name, tokens_of_stages
from newllm_jax.report.curves import compared_drawings
from newllm_jax.report.markup import escaped
from newllm_jax.report.pages import figure_notes, write_pages
from newllm_jax.report.plots import Drawing
from newllm_jax.report.published import published_curve
from newllm_jax.report.tables import markdown_table, number

PICTURE, RESULTS = "comparison.png", "results.json"
SOURCES = "dataset", "dataset_config", "base_model", "fallback"  # settings that the provenance of a run says better
# Of the data: perplexities are over different targets where these differ.
COUNTS = ("train_tokens", "val_tokens", "vocabulary_size", "validation_targets")


def read_results(path: str | Path) -> dict[str, Any]:
    """The results of a run directory, or of a `results.json` wherever it lies.

    Raises:
      InputError: no such file, a run that is not finished, or no results of ours.
    """
    path = checked_path("run", path)
    is_file = path.is_file()
    results = read_sealed(path) if is_file else RunDir.open(path).read_json("results.json")
    if isinstance(results, dict):
        results = {"name": path.stem if is_file else path.name, **results}
    check_results(results, path if is_file else path / "results.json")
    return results


def check_distinct(paths: Sequence[str | Path]) -> None:
    """Raises InputError where two paths name one run, by its directory or its `results.json`."""
    runs = [_run_of(path) for path in paths]
    for index, run in enumerate(runs):
        if run in runs[:index]:
            raise InputError(f"runs: {shown(str(paths[index]))} is named twice")


def comparison_folder(paths: Sequence[str | Path]) -> Path:
    """The folder `comparison` beside the runs, in the deepest folder that holds them all.

    Raises:
      InputError: they have none in common but the root of the disk.
    """
    runs = [_run_of(path) for path in paths]
    common = Path(os.path.commonpath([run.parent for run in runs]))
    if common == Path(common.anchor):
        raise InputError("output: the runs have no folder in common; name one for the comparison with --output")
    return common / "comparison"


def _run_of(path: str | Path) -> Path:
    """The directory of a run; of a file of results by another name the file."""
    resolved = Path(path).resolve()
    return resolved.parent if resolved.name == RESULTS else resolved


def write_comparison(folder: Path, runs: Sequence[dict[str, Any]]) -> Path:
    """Writes `comparison.png`, `comparison.md` and `comparison.html`; returns the path of `comparison.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_pages(folder, "comparison", comparison(runs), PICTURE, drawings_of(runs), {"name": "Comparison"})


def drawings_of(runs: Sequence[dict[str, Any]]) -> list[Drawing]:
    """The curves of all runs on the same axes, beside the published curves that some of them may be shown beside."""
    curves = {curve.name: curve for run in runs if (curve := published_curve(run))}
    return [*compared_drawings(runs, [*curves.values()]), *compared_ensembles(runs)]


def comparison(runs: Sequence[dict[str, Any]]) -> str:
    """The tables of several results, as Markdown. Nothing is refused; what differs in provenance is said."""
    cascades, drawings = [run for run in runs if "ensemble" in run], drawings_of(runs)
    parts = ["# Comparison", overall_table(runs), differences(runs)]
    if drawings:
        parts += [f"![curves of the runs]({PICTURE})", figure_notes(drawings).strip()]
    if cascades:
        parts += ["## Stages", stages_table(cascades), "## Ensemble: perplexity over all validation tokens"]
        parts += [ensemble_columns(cascades)]
    return "\n\n".join(part for part in parts if part) + "\n"


def overall_table(runs: Sequence[dict[str, Any]]) -> str:
    """One line a run: the lowest perplexity over all validation tokens, of what, and at what cost."""
    header = ["run", "system", "parameters", "best val PPL, all tokens", "reached by", "seconds", "device"]
    rows = []
    for run in runs:
        parameters, ppl, what = best_of(run)
        rows.append([
            escaped(run["name"]), run["system"], f"{parameters:,}", number(ppl), what, number(run.get("seconds"), 0),
            escaped(run["environment"]["device"]),
        ])  # fmt: skip
    return markdown_table(header, rows)


def best_of(run: dict[str, Any]) -> tuple[int, float | None, str]:
    """Parameters, perplexity and name of the best that a run has over all validation tokens."""
    if "ensemble" in run:
        best = min(run["ensemble"], key=lambda entry: math.inf if entry["val_ppl"] is None else entry["val_ppl"])
        return best["parameters"], best["val_ppl"], configuration_name(best["stages"])
    return run["parameters"], run["best"]["val_ppl"], f"epoch {run['best']['epoch']}"


def differences(runs: Sequence[dict[str, Any]]) -> str:
    """Which runs read other data, started from another base or ran elsewhere, so that figures compare only loosely."""
    lines = []
    for what, key in (("data", "data"), ("base model", "base")):
        groups: dict[tuple[str, str], list[str]] = {}
        for run in runs:
            source = run.get(key)
            if source:
                # A fingerprint says what was read, wherever it lay; the published runs have a name only.
                identity = source.get("fingerprint") or source["source"]
                counts = "+".join(str(source.get(name, "")) for name in COUNTS)
                groups.setdefault((identity, counts), []).append(f"{escaped(run['name'])}: {escaped(source['source'])}")
        if len(groups) > 1:
            named = "; ".join(name for group in groups.values() for name in group)
            lines.append(f"> **Different {what}**, so figures compare only loosely: {named}.")
    lines += different_settings(runs)
    lines += [f"> {escaped(run['name'])}: {run['note']}." for run in runs if run.get("note")]
    fallbacks = [run["name"] for run in runs if any(run.get(key, {}).get("fallback") for key in ("data", "base"))]
    if fallbacks:
        lines.append(f"> Read another source than asked for: {', '.join(map(escaped, fallbacks))}.")
    return "\n>\n".join(lines)


def different_settings(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A line for the runs of each system: their settings that are not the same, and what they are in each run."""
    lines = []
    for system in dict.fromkeys(run["system"] for run in runs):
        alike = [run for run in runs if run["system"] == system]
        # A run of an earlier version lacks settings that came later, and is not said to differ in them.
        names = [name for name in alike[0]["config"] if all(name in run["config"] for run in alike)]
        differing = {name: [run["config"][name] for run in alike] for name in names if name not in SOURCES}
        told = [
            f"`{name}` {' / '.join(escaped(json.dumps(value)) for value in values)}"
            for name, values in differing.items()
            if any(value != values[0] for value in values)
        ]
        if told:
            order = " / ".join(escaped(run["name"]) for run in alike)
            lines.append(f"> **Different settings** of {order}: {'; '.join(told)}.")
    return lines


def stages_table(runs: Sequence[dict[str, Any]]) -> str:
    """The table of the report of CASCADE: for each stage and run the tokens, threshold, perplexities and time."""
    header = ["stage", "run", "hard ratio", "train tokens", "val tokens", "threshold", "PPL last", "best", "of tokens",
              "all-token PPL Base+k", "seconds"]  # fmt: skip
    most = max(len(run["stages"]) for run in runs)
    rows = []
    for index in range(most):
        for run in runs:
            if index >= len(run["stages"]):
                continue
            stage = run["stages"][index]
            everything = {entry["stages"]: entry["val_ppl"] for entry in run["ensemble"]}
            rows.append([
                str(stage["stage"]), escaped(run["name"]), f"{run['config']['hard_ratio']:g}",
                f"{stage['train_tokens']:,}", f"{stage['val_tokens']:,}", f"{stage['threshold']:.4f}",
                number(stage["last"]["val_ppl"]), number(stage["best"]["val_ppl"]), tokens_of_stages(run["config"]),
                number(everything.get(stage["stage"])), number(stage["seconds"], 1),
            ])  # fmt: skip
    return markdown_table(header, rows)


def ensemble_columns(runs: Sequence[dict[str, Any]]) -> str:
    """One line a configuration, one column a run."""
    most = max(len(run["ensemble"]) for run in runs)
    rows = []
    for index in range(most):
        entries = [run["ensemble"][index] if index < len(run["ensemble"]) else None for run in runs]
        rows.append([configuration_name(index), *(number(entry and entry["val_ppl"]) for entry in entries)])
    return markdown_table(["model", *(escaped(run["name"]) for run in runs)], rows)
