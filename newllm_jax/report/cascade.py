"""The report of a CASCADE run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from newllm_jax.records.directory import RunDir
from newllm_jax.report.cascade_drawings import cascade_drawings
from newllm_jax.report.cascade_tables import (
    configuration_name,
    design_text,
    ensemble_table,
    exit_group_table,
    provenance_warning,
    stage_epochs,
    stage_table,
    test_table,
    verdict,
)
from newllm_jax.report.exits import exit_text
from newllm_jax.report.markup import escaped
from newllm_jax.report.pages import CURVES, ending_text, write_pages


def write_report(run: RunDir, results: dict[str, Any]) -> Path:
    """Writes `curves.png`, `report.md` and `report.html`; returns the path of `report.md`."""
    return write_pages(run.path, "report", cascade_report(results), CURVES, cascade_drawings(results), results)


def cascade_report(results: dict[str, Any]) -> str:
    """`report.md` of a CASCADE run, from its `results.json`."""
    config, data, base = (results[key] for key in ("config", "data", "base"))
    last = results["ensemble"][-1]
    return f"""# CASCADE: {escaped(results["name"])}

{provenance_warning(results)}**{verdict(results)}**

![stages and ensemble]({CURVES})

{exit_text(results)}## Stages

{_stages_text(config)} "Last" weights and "best" ones are both kept; \
**{config["stage_weights"]}** ones went on to the next stage and to the ensemble.

{stage_table(results)}

## Ensemble over all {data["val_tokens"]:,} validation tokens

{ensemble_table(results)}

{test_table(results)}\
Does handing on pay? The tokens of {configuration_name(last["stages"])}, by the place where they exit:

{exit_group_table(last)}

## The run

| | |
|---|---|
| base | {escaped(base["source"])}: {base["layers"]} layers, {base["parameters"]:,} parameters, frozen |
| data | {escaped(data["source"])}: {data["train_chunks"]:,} + {data["validation_chunks"]:,} chunks, \
{data["train_tokens"]:,} train and {data["val_tokens"]:,} validation tokens |
| hard tokens | {config["criterion"]}, {_threshold_text(config)} |
| stages | {design_text(config)}; AdamW {config["learning_rate"]:g}, \
weight decay {config["weight_decay"]:g}, batch {config["batch_size"]}, up to {config["num_epochs"]} epochs, \
patience {config["patience"]}, seed {config["seed"]} |

## Epochs

{stage_epochs(results)}

{ending_text(results)}"""


def _threshold_text(config: dict[str, Any]) -> str:
    """How many tokens are hard."""
    cost = config.get("flops")
    if cost is not None:
        return f"as many as cost {cost:g} passes of the base"
    measured = "calibration" if config.get("calibration_chunks") else "training"
    return (
        f"hard ratio {config['hard_ratio']:g} of the {measured} tokens; of other tokens, what the same threshold gives"
    )


def _stages_text(config: dict[str, Any]) -> str:
    """What the perplexities of the table of stages are of."""
    if config.get("skipped_layers"):
        return "The perplexity by epoch is that of all tokens, a fixed share of them hard, before there is a threshold."
    if config.get("trained_on") == "all":
        return "The perplexity by epoch is that of all tokens, each of which passes the stage."
    return (
        "The perplexity of a stage is measured on its own hard tokens, another and smaller set for each; only the last "
        "column but one, over all tokens, can be compared between lines."
    )
