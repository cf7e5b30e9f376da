"""The table of `python -m benchmarks.signal`: what gets through the layers, by variant and epoch."""

from __future__ import annotations

from typing import Any

from newllm_jax.report.tables import markdown_table, number

EPOCHS = (0, 10, 16, 20)


def signal_table(results: dict[str, Any]) -> str:
    """Of every variant, the share of the signal and of the gradient that crosses all layers, and the perplexity.

    A signal goes up, from layer 1 to the last one; a gradient comes down. An epoch that was not trained has a dash.
    """
    rows = []
    for name, variant in results["variants"].items():
        if "error" in variant:
            rows.append([name, variant["error"], *["-"] * len(EPOCHS)])
            continue
        by_epoch = {entry["epoch"]: entry for entry in variant["epochs"]}
        entries, last = [by_epoch.get(epoch) for epoch in EPOCHS], len(by_epoch[0]["signal"])
        rows += [
            [name, f"signal, layer {last} / layer 1", *(_ratio(entry, "signal", -1, 0) for entry in entries)],
            [name, f"gradient, layer 1 / layer {last}", *(_ratio(entry, "gradient", 0, -1) for entry in entries)],
            [name, "val PPL", *(number(entry and entry["val_ppl"]) for entry in entries)],
        ]
    return markdown_table(["variant", "what", *(f"epoch {epoch}" for epoch in EPOCHS)], rows)


def _ratio(entry: dict[str, Any] | None, measure: str, layer: int, reference: int) -> str:
    """Of two layers; a dash where the reference is 0."""
    values: list[float] = entry[measure] if entry else []
    return f"{values[layer] / values[reference]:.2g}" if values and values[reference] else "-"
