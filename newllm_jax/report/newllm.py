"""The report of a New-LLM run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from newllm_jax.records.directory import RunDir
from newllm_jax.report.plots import save_curves
from newllm_jax.report.tables import epoch_table, number


def write_report(run: RunDir, results: dict[str, Any]) -> Path:
    """Writes `curves.png` and `report.md`; returns the latter's path."""
    save_curves(run.path / "curves.png", results["epochs"], results["name"])
    return run.write_text("report.md", newllm_report(results))


def newllm_report(results: dict[str, Any]) -> str:
    """`report.md` of a New-LLM run, from its `results.json`."""
    data, best, test, config = results["data"], results["best"], results["test"], results["config"]
    environment = results["environment"]
    warning = ""
    if data["fallback"]:
        warning = (
            f"> **Not the data that was asked for.** {data['asked']} was not available ({data['fallback']}), "
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
