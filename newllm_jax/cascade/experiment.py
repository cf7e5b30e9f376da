"""The CASCADE experiment from top to bottom: the frozen base once, stage after stage on hard tokens, the ensemble."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from newllm_jax.cascade.ensemble import evaluate_ensemble
from newllm_jax.cascade.extraction import Tokens, extract
from newllm_jax.cascade.hardness import stage_counts
from newllm_jax.cascade.run import (
    RESUMABLE,
    SYSTEM,
    CascadeRun,
    Narrate,
    check_fingerprint,
    load_base,
    narrate_sources,
    run_name,
)
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.cascade.stage.training import SPLITS, StageTrainer
from newllm_jax.config import CascadeConfig
from newllm_jax.records.directory import RunDir
from newllm_jax.records.machine import command_line, environment, peak_memory_bytes
from newllm_jax.records.progress import progress_bar
from newllm_jax.records.results import SCHEMA_VERSION
from newllm_jax.records.stored_config import resumed_config
from newllm_jax.records.trackers import check_tracker
from newllm_jax.report.cascade_tables import cascade_report, ensemble_table, verdict
from newllm_jax.report.plots import save_stage_curves
from newllm_jax.smollm.alpaca import AlpacaChunks, load_alpaca
from newllm_jax.smollm.model import count_parameters
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.training.precision import PRECISIONS, resolve_precision


@dataclass(frozen=True)
class CascadeResult:
    """What a run gave.

    Attributes:
      run_dir: where its files lie.
      results: the content of `results.json`.
    """

    run_dir: Path
    results: dict[str, Any]


def train_cascade(
    config: CascadeConfig | None = None,
    *,
    name: str = "cascade",
    run_root: str | Path = "runs",
    resume: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    narrate: Narrate = print,
) -> CascadeResult:
    """Trains stage after stage on the hard tokens of a frozen SmolLM2 and evaluates the ensemble over all tokens.

    The procedure is that of the report of CASCADE: `stage_weights` "last" hands the last weights of a stage to the next
    one and to the ensemble, as published; `best` those of the lowest validation loss.

    Args:
      config: a new run's settings.
      name, run_root: a new run goes to `run_root/name-time`.
      resume: a run directory to go on with instead; `overrides` may raise `num_stages`. The result is that of a run
        which was never stopped.
      narrate: takes the lines that tell what was resolved.

    Raises:
      InputError: a setting, data set, base model or run directory that cannot be used; no hard tokens left.
      NumericalError: the loss is no longer finite; the last good checkpoint stays.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        run = None if resume is None else stack.enter_context(RunDir.open(resume))
        if run is not None:
            config = resumed_config(run, SYSTEM, CascadeConfig, overrides or {}, RESUMABLE)
        else:
            config = (config or CascadeConfig()).override(overrides or {})
        check_tracker(config.tracker)
        precision = resolve_precision(config.precision)
        with progress_bar("base model and data", 0):
            base = load_base(config)
            data = load_alpaca(base.tokenizer, config)
        for count in (data.train_tokens, data.validation_tokens):
            stage_counts(count, config.hard_ratio, config.num_stages)
        if run is None:
            run = stack.enter_context(RunDir.create(run_root, run_name(name, base, data)))
        stage = Stage(stage_config(base.model.config, config.stage_layers), PRECISIONS[precision])
        sizes = stage_sizes(base, stage, config)
        narrate_start(narrate, base, data, run, sizes, config, precision)
        if resume is not None:
            check_fingerprint(run, "data", data.fingerprint, f"dataset: {data.provenance['source']}")
            check_fingerprint(run, "base", base.source.fingerprint, f"base_model: {base.source.used}")
            finished = finished_results(run, config)
            if finished is not None:
                narrate(f"finished, all {config.num_stages} stages (raise num_stages to go on)")
                return CascadeResult(run.path, finished)
        run.write_json("config.json", {
            "schema_version": SCHEMA_VERSION,
            "system": SYSTEM,
            "config": config.to_dict(),
            "fingerprints": {"data": data.fingerprint, "base": base.source.fingerprint},
        })  # fmt: skip

        tokens = read_base(base, data, config, run)
        narrate_base(narrate, tokens["validation"])
        cascade = StageTrainer(stage, config, precision, run, narrate, started)
        everything = tokens["validation"]
        for number in range(1, config.num_stages + 1):
            tokens = cascade.train_stage(number, tokens)

        handed_on = sum(stage_counts(len(everything), config.hard_ratio, config.num_stages))
        with progress_bar("ensemble", handed_on) as advance:
            ensemble = evaluate_ensemble(
                everything, cascade.strict, cascade.stages, config.criterion, sizes["base"], advance
            )
        results = {
            "schema_version": SCHEMA_VERSION,
            "system": SYSTEM,
            "name": run.path.name,
            "config": config.to_dict(),
            "command": command_line(),
            "environment": environment(precision),
            "data": data.summary(),
            "base": {
                **base.source.provenance(),
                "parameters": sizes["base"],
                "layers": base.model.config.num_layers,
                "val_loss": ensemble[0]["val_loss"],
                "val_ppl": ensemble[0]["val_ppl"],
            },
            "stages": [describe_stage(entry, base, sizes, config) for entry in cascade.reports],
            "ensemble": ensemble,
            "seconds": cascade.seconds(),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        run.write_json("results.json", results)
        save_stage_curves(run.path / "curves.png", results["stages"], ensemble, run.path.name)
        run.write_text("report.md", cascade_report(results))
        shutil.rmtree(extraction_folder(run), ignore_errors=True)
    narrate(ensemble_table(results))
    narrate(verdict(results))
    narrate(f"report      {run.path / 'report.md'}")
    return CascadeResult(run.path, results)


def evaluate_run(run: CascadeRun) -> list[dict[str, Any]]:
    """The ensemble of a restored run over all its validation tokens, as `evaluate_ensemble` gives it."""
    data = load_alpaca(run.tokenizer, run.config)
    check_fingerprint(run.run, "data", data.fingerprint, f"dataset: {data.provenance['source']}")
    with progress_bar("base: hidden states", len(data.validation)) as advance:
        params = jax.device_put(run.base.params)
        tokens = extract(run.base.model, params, data.validation, run.config.criterion, advance=advance)
    parameters = count_parameters(run.base.params)
    handed_on = sum(stage_counts(len(tokens), run.config.hard_ratio, len(run.stages)))
    with progress_bar("ensemble", handed_on) as advance:
        return evaluate_ensemble(tokens, run.stage, run.stages, run.config.criterion, parameters, advance)


def read_base(base: Pretrained, data: AlpacaChunks, config: CascadeConfig, run: RunDir) -> dict[str, Tokens]:
    """What the frozen base makes of all tokens; finished pieces of a stopped run are read instead."""
    params = jax.device_put(base.params)
    chunks = {"train": data.train, "validation": data.validation}
    with progress_bar("base: hidden states", sum(map(len, chunks.values()))) as advance:
        return {
            split: extract(base.model, params, chunks[split], config.criterion, extraction_folder(run), split, advance)
            for split in SPLITS
        }


def extraction_folder(run: RunDir) -> Path:
    """Where finished pieces of the extraction lie until the run is finished."""
    return run.path / "extraction"


def stage_sizes(base: Pretrained, stage: Stage, config: CascadeConfig) -> dict[str, int]:
    """Parameters of the base and of one stage."""
    shapes = jax.eval_shape(lambda: init_stage(stage, config.seed, 1))
    return {"base": count_parameters(base.params), "stage": count_parameters(shapes)}


def describe_stage(
    report: dict[str, Any], base: Pretrained, sizes: dict[str, int], config: CascadeConfig
) -> dict[str, Any]:
    """A stage as `results.json` has it."""
    number = report["stage"]
    return {
        "stage": number,
        "added_layers": config.stage_layers,
        "total_layers": base.model.config.num_layers + number * config.stage_layers,
        "stage_parameters": sizes["stage"],
        "total_parameters": sizes["base"] + number * sizes["stage"],
        "criterion": config.criterion,
        "hard_ratio": config.hard_ratio,
        **report,
    }


def finished_results(run: RunDir, config: CascadeConfig) -> dict[str, Any] | None:
    """The results of a run that is finished and asked for nothing more, else None."""
    if not (run.path / "results.json").is_file():
        return None
    results = run.read_json("results.json")
    return results if len(results["stages"]) >= config.num_stages else None


def narrate_start(
    narrate: Narrate,
    base: Pretrained,
    data: AlpacaChunks,
    run: RunDir,
    sizes: dict[str, int],
    config: CascadeConfig,
    precision: str,
) -> None:
    """Tells what a run resolved: device, base, data, parameters, run directory."""
    narrate_sources(narrate, base, data, config, precision)
    total = sizes["base"] + config.num_stages * sizes["stage"]
    narrate(f"parameters  {total:,}: the frozen base and {config.num_stages} stages of {sizes['stage']:,}")
    narrate(f"run         {run.path}")


def narrate_base(narrate: Narrate, validation: Tokens) -> None:
    """Tells what the base alone is worth."""
    loss = float(np.mean(validation.losses, dtype=np.float64))
    narrate(f"base        validation loss {loss:.4f}, PPL {np.exp(loss):.2f} over all tokens")
