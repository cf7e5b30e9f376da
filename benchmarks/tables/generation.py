"""The table of `python -m benchmarks.generation`: tokens a second by form, CUDA graphs, precision, batch and call."""

from __future__ import annotations

from typing import Any

from newllm_jax.report.tables import markdown_table


def text_table(results: dict[str, Any]) -> str:
    """A line for every row that was measured; `same tokens` are those that begin as in the first row."""
    header = ["form", "CUDA graph of", "precision", "sampling", "batch", "tokens a call", "tokens/s (min to max)",
              "base's weights, share of memory rate", "first tokens, ms", "ready after, s", "same tokens",
              "exits"]  # fmt: skip
    return markdown_table(header, [_line(row) for row in results["rows"]])


def _line(row: dict[str, Any]) -> list[str]:
    stages = f" + stages of {row['stage_layers']} layers" if row.get("stage_layers") else ""
    line = [f"{row['form']}{stages}", row["graphs"], row["precision"], row["sampling"], str(row["batch"]),
            str(row["per_call"])]  # fmt: skip
    if "error" in row:
        return [*line, row["error"], *["-"] * 5]
    rate = row["tokens_per_second"]
    return [
        *line, f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})", f"{row['bytes_fraction']:.1%}",
        f"{1e3 * row['first_seconds']['median']:,.1f}", f"{row['prepare_seconds']:.1f}", str(row["same_tokens"]),
        " ".join(map(str, row["exits"])),
    ]  # fmt: skip
