"""Markdown tables and the report of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


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
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def newllm_report(results: dict[str, Any]) -> str:
    """`report.md` of a New-LLM run, from its `results.json`."""
    data, best, test, config = results["data"], results["best"], results["test"], results["config"]
    environment = results["environment"]
    warning = ""
    if data["fallback"]:
        warning = (
            f"> **Not the data that was asked for.** {data['asked']} could not be had ({data['fallback']}), "
            f"so this run read {data['source']}. Its figures must not be compared with published ones.\n\n"
        )
    return f"""# New-LLM: {results["name"]}

{warning}Best validation perplexity **{number(best["val_ppl"])}** (loss {best["val_loss"]:.4f}) after epoch \
{best["epoch"]} of {len(results["epochs"])}; on the test split, with the same parameters, **{number(test["ppl"])}** \
(loss {test["loss"]:.4f}, accuracy {test["accuracy"]:.1%}).

![learning curves](curves.png)

| | |
|---|---|
| command | `{results["command"]}` |
| data | {data["source"]}: {data["train_sequences"]:,} / {data["validation_sequences"]:,} / {data["test_sequences"]:,} \
sequences (train / validation / test), vocabulary {data["vocabulary_size"]:,} |
| model | {results["parameters"]:,} parameters: {config["num_layers"]} layers of {config["hidden_dim"]}, \
context vector of {config["context_dim"]}, embedding of {config["embed_dim"]} |
| training | {data["steps_per_epoch"]:,} updates an epoch at batch {config["batch_size"]}, \
learning rate {config["learning_rate"]:g} ({config["schedule"]}), seed {config["seed"]} |
| stopped | {results["stopped"]} |
| device | {environment["device"]} ({environment["platform"]}), {environment["precision"]}, \
jax {environment["jax"]}, flax {environment["flax"]} |
| time, memory | {results["seconds"]:.0f} s, {results["peak_memory_bytes"] / 2**30:.2f} GiB at most |

{epoch_table(results["epochs"])}
"""
