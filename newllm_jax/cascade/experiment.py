"""The CASCADE experiment from top to bottom: the frozen base once, stage after stage on hard tokens, the ensemble."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from newllm_jax.bars import progress_bar
from newllm_jax.cascade.design_experiment import measure_again, train_design
from newllm_jax.cascade.ensemble import TrainedStage, best_ensemble, measure_exits
from newllm_jax.cascade.example import exit_example
from newllm_jax.cascade.extraction import Pieces, Tokens, extract
from newllm_jax.cascade.hardness import stage_counts
from newllm_jax.cascade.plan import check_disk, check_fits
from newllm_jax.cascade.run import (
    DesignRun,
    begun_stages,
    extraction_folder,
    has_finished_design,
    read_stages,
    restore_cascade,
)
from newllm_jax.cascade.stage.model import Stage, stage_config, stage_size
from newllm_jax.cascade.stage.training import SPLITS, FinishedStage, TokenSplits, hand_on, train_stage
from newllm_jax.cascade.stage.updates import StageTraining, build_stage_training, slow_update_warning
from newllm_jax.cascade.states import spare_folder
from newllm_jax.config import CascadeConfig, Precision
from newllm_jax.errors import InputError
from newllm_jax.processes import are_several
from newllm_jax.records.directory import RunDir
from newllm_jax.records.mirror import Mirror
from newllm_jax.records.narration import Narrate, tell
from newllm_jax.records.progress import narrate_start
from newllm_jax.records.results import (
    RunResult,
    check_fingerprints,
    describe_run,
    finished_results,
    results_footer,
    results_header,
)
from newllm_jax.records.stored_config import resume_or_start
from newllm_jax.report.cascade import write_report
from newllm_jax.report.cascade_tables import ensemble_table, verdict
from newllm_jax.report.finish import PAGE, complete, write_results
from newllm_jax.smollm.alpaca import AlpacaChunks, load_alpaca
from newllm_jax.smollm.base import (
    base_results,
    fingerprints,
    load_base_and_data,
    run_name,
    source_facts,
    source_warnings,
)
from newllm_jax.smollm.flops import Costs
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.training.clock import Clock
from newllm_jax.training.mesh import DeviceMesh, choose_mesh
from newllm_jax.training.precision import resolve_precision
from newllm_jax.training.step import count_parameters
from newllm_jax.training.stopping import Asked, Stopping, never

# What several devices are for where a stage is trained on a few tokens at a time.
MESH_WARNING = (
    "Several devices share out what the base and finished stages compute. A stage's updates, of a few single tokens, "
    "gain little: they take as long as its parameters take to be read and written."
)


def train_cascade(
    config: CascadeConfig | None = None,
    *,
    name: str = "cascade",
    run_root: str | Path = "runs",
    resume: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    narrate: Narrate = print,
    stop: Asked = never,
) -> RunResult:
    """Trains stage after stage on the hard tokens of a frozen SmolLM2 and evaluates the ensemble over all tokens.

    With the published design, the procedure is that of the report of CASCADE: `stage_weights` "last" gives the last
    weights of a stage to the next one and to the ensemble, as published; `best` those of the lowest validation loss.

    Arguments and errors are those of `train_newllm`; resuming may raise `num_stages`. InputError also where no hard
    tokens are left for a stage, or the disk has no room for the hidden states.
    """
    clock = Clock()
    with ExitStack() as stack:
        run, config = resume_or_start(stack, resume, config, CascadeConfig, overrides)
        precision = resolve_precision(config.precision)
        base, data = load_base_and_data(config)
        check_fits(config, base.model.config, data, precision)
        check_disk(config, base.model.config, data, run.path if run else Path(run_root))
        run = run or stack.enter_context(RunDir.create(run_root, run_name(name, base, data)))
        stopping = Stopping(clock, run.path, config, stop)
        mirror = stack.enter_context(Mirror(run, config.mirror, narrate, stopping.timer("mirror")))
        mesh = choose_mesh(config.mesh, config.examples_at_once)
        if config.has_published_design and are_several():
            raise InputError("context: stages of the published design, which read single tokens, are trained by one "
                             "process; a design on sequences by several")  # fmt: skip
        _narrate(narrate, run, config, base, data, precision, mesh)
        if resume is not None:
            check_fingerprints(run, fingerprints(base, data))
        _check_stages(run, config)
        run.begin(describe_run(config, precision, fingerprints(base, data)))
        mirror.start()
        if finished := _finished(run, base, config, narrate):
            more = " (raise num_stages to continue)" if config.has_published_design else ""
            narrate(f"finished, all {config.num_stages} stages{more}")
            shutil.rmtree(extraction_folder(run), ignore_errors=True)
            return complete(run, finished, write_report)
        train = train_stages if config.has_published_design else train_design
        measured = train(run, config, base, data, precision, stopping, narrate)
        results = write_results(run, write_report, {
            **results_header(run, config, precision), **mesh.summary(),
            "data": data.summary(),
            **measured,
            **results_footer(clock.seconds()),
        })  # fmt: skip
        shutil.rmtree(extraction_folder(run), ignore_errors=True)
    tell(narrate, "ensemble", ensemble_table(results), {"ensemble": results["ensemble"]})
    narrate(verdict(results))
    narrate(f"report      {run.path / PAGE}")
    return RunResult(run.path, results)


def train_stages(
    run: RunDir,
    config: CascadeConfig,
    base: Pretrained,
    data: AlpacaChunks,
    precision: Precision,
    stopping: Stopping,
    narrate: Narrate,
) -> dict[str, Any]:
    """Trains stage after stage as published and measures the ensemble: the entries of `results.json`."""
    tokens = read_base(base, data, config, run, stopping)
    validation = tokens["validation"]
    loss = float(np.mean(validation.losses, dtype=np.float64))
    narrate(f"base        validation loss {loss:.4f}, PPL {np.exp(loss):.2f} over all tokens")
    stage = Stage(stage_config(base.model.config, config.stage_layers), precision)
    shared, stages = build_stage_training(stage, config), list[FinishedStage]()
    for number in range(1, config.num_stages + 1):
        finished, tokens = train_stage(shared, run, tokens, stages, stopping, narrate), {}
        if number < config.num_stages:
            tokens = hand_on(shared, number, finished, stopping)
        stages.append(replace(finished, hard={}))  # whose files vanish with what reads them
        del finished
    trained = [finished.trained for finished in stages]
    ensemble, exits = measure_ensemble(validation, shared.strict, trained, config, base, stopping)
    return {
        "base": base_results(base, ensemble[0]["val_loss"], ensemble[0]["val_ppl"]),
        "stages": [_describe_stage(finished.entry, base, shared) for finished in stages],
        "ensemble": ensemble,
        "kept_stages": best_ensemble(ensemble) if config.kept_stages == "best" else config.num_stages,
        **exit_example(base.tokenizer, data.validation, exits, config.sample_words),
    }


def _check_stages(run: RunDir, config: CascadeConfig) -> None:
    """Raises InputError where a run has begun more stages than it is to have."""
    begun = max(begun_stages(run), default=0)
    if begun > config.num_stages:
        raise InputError(f"num_stages: {run.path} has {begun} stages already, not {config.num_stages}")


def _finished(run: RunDir, base: Pretrained, config: CascadeConfig, narrate: Narrate) -> dict[str, Any] | None:
    """The results of a run that has them and all its stages; None for one that is to be trained on."""
    try:
        if config.has_published_design:
            stage = Stage(stage_config(base.model.config, config.stage_layers))
            are_whole = len(read_stages(run, stage, config)) == config.num_stages
        else:
            are_whole = has_finished_design(run, base, config)
    except InputError as error:
        narrate(f"note        {error}")
        return None
    return finished_results(run, "stages", config.num_stages) if are_whole else None


def evaluate_run(run_dir: str | Path) -> dict[str, Any]:
    """The ensemble of a run over all its validation tokens, measured again: `{"ensemble": ...}`."""
    run = restore_cascade(run_dir)
    data = load_alpaca(run.tokenizer, run.config)
    check_fingerprints(run.run, fingerprints(run.base, data))
    if isinstance(run, DesignRun):
        return {"ensemble": measure_again(run, data)}
    folder = spare_folder(data.validation_tokens, run.base.model.config.hidden_size)
    with progress_bar("base: hidden states", len(data.validation)) as advance:
        params, criterion = jax.device_put(run.base.params), run.config.criterion
        tokens = extract(run.base.model, params, data.validation, criterion, advance=advance, folder=folder)
    return {"ensemble": measure_ensemble(tokens, run.stage, list(run.stages), run.config, run.base)[0]}


def read_base(
    base: Pretrained, data: AlpacaChunks, config: CascadeConfig, run: RunDir, stopping: Stopping
) -> TokenSplits:
    """The outputs of the frozen base for all tokens; finished pieces of a stopped run are read instead."""
    params = choose_mesh(config.mesh, config.examples_at_once).place(jax.device_put(base.params))
    chunks = {"train": data.train, "validation": data.validation}
    with progress_bar("base: hidden states", sum(map(len, chunks.values()))) as advance:
        advance = stopping.between("base", advance)
        pieces = {split: Pieces(extraction_folder(run), split, base.source.fingerprint) for split in SPLITS}
        return {
            split: extract(base.model, params, chunks[split], config.criterion, pieces[split], advance)
            for split in SPLITS
        }


def measure_ensemble(
    tokens: Tokens,
    stage: Stage,
    stages: list[TrainedStage],
    config: CascadeConfig,
    base: Pretrained,
    stopping: Stopping | None = None,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """`measure_exits`, with a progress bar; the rows say too what a token costs, in passes of the base."""
    handed_on = sum(stage_counts(len(tokens), config.hard_ratio, len(stages))) if stages else 0
    with progress_bar("ensemble", handed_on) as advance:
        advance = stopping.between("ensemble", advance) if stopping else advance
        rows, exits = measure_exits(tokens, stage, stages, config.criterion, count_parameters(base.params), advance)
    costs = Costs.from_config(base.model.config)
    a_stage = costs.published_stage(config.stage_layers, config.criterion) / costs.base
    passed = [sum(number * rate for number, rate in enumerate(row["exit_rates"])) for row in rows]
    return [{**row, "flops": 1 + mean * a_stage} for row, mean in zip(rows, passed, strict=True)], exits


def _describe_stage(entry: dict[str, Any], base: Pretrained, shared: StageTraining) -> dict[str, Any]:
    """A stage as `results.json` has it."""
    number, config, size = entry["stage"], shared.config, stage_size(shared.stage.config)
    return {
        "stage": number,
        "added_layers": config.stage_layers,
        "total_layers": base.model.config.num_layers + number * config.stage_layers,
        "stage_parameters": size,
        "total_parameters": count_parameters(base.params) + number * size,
        "criterion": config.criterion,
        "hard_ratio": config.hard_ratio,
        **entry,
    }


def _narrate(
    narrate: Narrate,
    run: RunDir,
    config: CascadeConfig,
    base: Pretrained,
    data: AlpacaChunks,
    precision: Precision,
    mesh: DeviceMesh,
) -> None:
    """Tells what a run resolved."""
    facts, warnings = source_facts(base, data) | mesh.facts(), source_warnings(base, data, config)
    if config.has_published_design:
        size = stage_size(stage_config(base.model.config, config.stage_layers))
        total = count_parameters(base.params) + config.num_stages * size
        facts["parameters"] = f"{total:,}: the frozen base and {config.num_stages} stages of {size:,}"
        warnings.append(slow_update_warning(config, base.model.config))
        if not mesh.is_single:
            warnings.append(MESH_WARNING)
    narrate_start(narrate, run, precision, facts, warnings)
