"""The report of a New-LLM run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from newllm_jax.records.directory import RunDir
from newllm_jax.report.curves import training_drawings
from newllm_jax.report.markup import escaped
from newllm_jax.report.pages import CURVES, ending_text, figure_notes, sample_text, write_pages
from newllm_jax.report.plots import Drawing
from newllm_jax.report.published import published_curve
from newllm_jax.report.tables import epoch_table, number


def write_report(run: RunDir, results: dict[str, Any]) -> Path:
    """Writes `curves.png`, `report.md` and `report.html`; returns the path of `report.md`."""
    drawings = newllm_drawings(results)
    return write_pages(run.path, "report", newllm_report(results), CURVES, drawings, results)


def newllm_drawings(results: dict[str, Any]) -> list[Drawing]:
    """The learning curves, beside the published one where the run has its settings and data."""
    return training_drawings(results["epochs"], published=published_curve(results))


def newllm_report(results: dict[str, Any]) -> str:
    """`report.md` of a New-LLM run, from its `results.json`."""
    data, best, test, config = results["data"], results["best"], results["test"], results["config"]
    warning = ""
    if data["fallback"]:
        warning = (
            f"> **Not the data that was asked for.** {escaped(data['asked'])} was not available "
            f"({escaped(data['fallback'])}), so this run read {escaped(data['source'])}. Its figures must not be "
            "compared with published ones.\n\n"
        )
    return f"""# New-LLM: {escaped(results["name"])}

{warning}Best validation perplexity **{number(best["val_ppl"])}** (loss {best["val_loss"]:.4f}) after epoch \
{best["epoch"]} of {len(results["epochs"])}; on the test split, with the same parameters, **{number(test["ppl"])}** \
(loss {test["loss"]:.4f}, accuracy {test["accuracy"]:.1%}).

![learning curves]({CURVES})

{figure_notes(newllm_drawings(results))}## The run

| | |
|---|---|
| data | {escaped(data["source"])}: {data["train_sequences"]:,} / {data["validation_sequences"]:,} / \
{data["test_sequences"]:,} sequences (train / validation / test), vocabulary {data["vocabulary_size"]:,} |
| model | {results["parameters"]:,} parameters: {config["num_layers"]} layers of {config["hidden_dim"]}, \
context vector of {config["context_dim"]}, embedding of {config["embed_dim"]} |
| training | {data["steps_per_epoch"]:,} updates an epoch at batch {config["batch_size"]}, \
learning rate {config["learning_rate"]:g} ({config["schedule"]}), seed {config["seed"]} |
| stopped | {results["stopped"]} |

{sample_text(results)}## Epochs

{epoch_table(results["epochs"])}

{ending_text(results)}"""
