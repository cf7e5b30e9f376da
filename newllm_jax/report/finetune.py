"""The report of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from newllm_jax.records.directory import RunDir
from newllm_jax.report.cascade_tables import provenance_warning
from newllm_jax.report.curves import training_drawings
from newllm_jax.report.markup import escaped
from newllm_jax.report.pages import CURVES, ending_text, sample_text, write_pages
from newllm_jax.report.tables import epoch_table, number


def write_report(run: RunDir, results: dict[str, Any]) -> Path:
    """Writes `curves.png`, `report.md` and `report.html`; returns the path of `report.md`."""
    drawings = training_drawings(results["epochs"], unit="token", dropout=False)
    return write_pages(run.path, "report", finetune_report(results), CURVES, drawings, results)


def finetune_report(results: dict[str, Any]) -> str:
    """`report.md` of a fine-tuning, from its `results.json`."""
    config, data, base, best = (results[key] for key in ("config", "data", "base", "best"))
    gain = best["val_loss"] - base["val_loss"]
    start = results.get("start", base)
    began = (
        ""
        if start["val_loss"] == base["val_loss"]
        else f""", and {best["val_loss"] - start["val_loss"]:+.4f} nats \
against the {number(start["val_ppl"])} of the model at the start"""
    )
    return f"""# Fine-tuning: {escaped(results["name"])}

{provenance_warning(results)}Best validation perplexity **{number(best["val_ppl"])}** (loss {best["val_loss"]:.4f}) \
after epoch {best["epoch"]} of {len(results["epochs"])}: {gain:+.4f} nats against the {number(base["val_ppl"])} of the \
base before{began}.

![learning curves]({CURVES})

## The run

| | |
|---|---|
| base | {escaped(base["source"])}: {base["layers"]} layers, {base["parameters"]:,} parameters |
| model | {model_text(config, {"layers": base["layers"], **results})} |
| data | {escaped(data["source"])}: {data["train_chunks"]:,} + {data["validation_chunks"]:,} chunks, \
{data["train_tokens"]:,} train and {data["val_tokens"]:,} validation tokens |
| training | AdamW {config["learning_rate"]:g}, weight decay {config["weight_decay"]:g}, \
batch {config["batch_size"]} chunks, up to {config["num_epochs"]} epochs, patience {config["patience"]}, \
seed {config["seed"]} |

{sample_text(results)}## Epochs

{epoch_table(results["epochs"])}

{ending_text(results)}"""


def model_text(config: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """The model that is trained and what of it, in words.

    Args:
      config: the settings; those that a run of an earlier version has not may be missing.
      counts: `layers`, `parameters` and `trained_parameters`.
    """
    trained, layers, dropped = (
        f"{counts['trained_parameters']:,}", config.get("trained_layers"), config.get("dropped_layers")
    )  # fmt: skip
    where = "all layers" if layers is None else "the last layer" if layers == 1 else f"the last {layers} layers"
    told = f"{counts['layers']} layers, {counts['parameters']:,} parameters"
    if dropped:
        told += f" (layers {dropped[0]} to {dropped[-1] - 1} of the base left out)"
    if config.get("adapter") == "lora":
        return f"{told}; trained: {trained} parameters of LoRA adapters, rank {config.get('rank')}, on {where}"
    if layers is not None:
        return f"{told}; trained: {trained} of them, {where} and the final norm"
    return f"{told}, all of them trained"
