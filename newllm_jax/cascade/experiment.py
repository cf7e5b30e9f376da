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
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.cascade.alpaca import AlpacaChunks, load_alpaca
from newllm_jax.cascade.ensemble import TrainedStage, evaluate_ensemble
from newllm_jax.cascade.extraction import Tokens, extract, run_stage
from newllm_jax.cascade.hardness import hardness_threshold, select_hard, stage_counts
from newllm_jax.cascade.pretrained import Pretrained
from newllm_jax.cascade.run import (
    RESUMABLE,
    SYSTEM,
    CascadeRun,
    Narrate,
    at_epoch,
    check_fingerprint,
    chosen_epoch,
    is_trained,
    load_base,
    narrate_sources,
    run_name,
    stage_folder,
)
from newllm_jax.cascade.smollm import count_parameters
from newllm_jax.cascade.stage import Stage, init_stage, next_token_loss, stage_config
from newllm_jax.config import CascadeConfig
from newllm_jax.report.cascade_tables import cascade_report, ensemble_table, verdict
from newllm_jax.report.plots import save_stage_curves
from newllm_jax.report.progress import TrainingProgress, progress_bar
from newllm_jax.report.run_dir import SCHEMA_VERSION, RunDir, command_line, environment, peak_memory_bytes
from newllm_jax.report.stored_config import resumed_config
from newllm_jax.report.trackers import check_tracker, open_tracker
from newllm_jax.training.checkpoint import Checkpoints
from newllm_jax.training.early_stopping import best_epoch
from newllm_jax.training.loop import Trainer, fit, stopped_early
from newllm_jax.training.optimizer import adamw
from newllm_jax.training.precision import PRECISIONS, resolve_precision
from newllm_jax.training.step import init_state, make_evaluation, make_updates

SPLITS = ("train", "validation")


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
        with progress_bar("base model and data", 0):
            base = load_base(config)
            data = load_alpaca(base.tokenizer, config)
        for count in (data.train_tokens, data.validation_tokens):
            stage_counts(count, config.hard_ratio, config.num_stages)
        if run is None:
            run = stack.enter_context(RunDir.create(run_root, run_name(name, base, data)))
        precision = resolve_precision(config.precision)
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
        cascade = StageTrainer(stage, config, run, narrate, started)
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


class StageTrainer:
    """Trains one stage after another and keeps what the results say of each."""

    def __init__(self, stage: Stage, config: CascadeConfig, run: RunDir, narrate: Narrate, started: float) -> None:
        self.stage, self.config, self.run, self.narrate, self.started = stage, config, run, narrate, started
        self.strict = stage.clone(precision=PRECISIONS["fp32"])
        self.optimizer = adamw(config.learning_rate, config.weight_decay)
        self.trainer = Trainer(
            make_updates(next_token_loss(stage), self.optimizer),
            make_evaluation(next_token_loss(self.strict)),
            optax.constant_schedule(config.learning_rate),
            None,
        )
        self.stages: list[TrainedStage] = []
        self.reports: list[dict[str, Any]] = []
        self.seconds_before = 0.0
        self.room: dict[str, int] = {}  # the tokens of the first stage: all stages run the programs compiled for it

    def seconds(self) -> float:
        """Of the run so far, those before a resumption included."""
        return self.seconds_before + time.monotonic() - self.started

    def train_stage(self, number: int, tokens: dict[str, Tokens]) -> dict[str, Tokens]:
        """Trains stage `number` on the hard ones of the tokens that its predecessor left, or goes on with it.

        Returns:
          The hard tokens of each split as the stage leaves them.
        """
        config = self.config
        # Validation picks its own share while training; the ensemble will use the threshold of the train tokens.
        thresholds = {split: hardness_threshold(tokens[split].scores, config.hard_ratio) for split in SPLITS}
        hard = {split: tokens[split].take(select_hard(tokens[split].scores, thresholds[split])) for split in SPLITS}
        counts = {split: f"{len(hard[split]):,} of {len(tokens[split]):,}" for split in SPLITS}
        self.narrate(f"stage {number}     threshold {thresholds['train']:.4f}: {counts['train']} train tokens, "
                     f"{counts['validation']} validation tokens")  # fmt: skip
        state = init_state(init_stage(self.stage, config.seed, number), self.optimizer)
        epochs_before = [{"stage": report["stage"], **entry} for report in self.reports for entry in report["epochs"]]
        with Checkpoints(stage_folder(self.run, number), config.checkpoint_every) as checkpoints:
            found, damaged = checkpoints.latest(state)
            if damaged:
                self.narrate(f"damaged, and passed over: the checkpoints of stage {number}, epochs {damaged}")
            history: list[dict[str, Any]] = []
            if found:
                state, history = found.state, found.record["history"]
                self.seconds_before = max(self.seconds_before, found.record["seconds"])
                checkpoints.drop_after(found.epoch)
                self.narrate(f"stage {number}     going on after epoch {found.epoch}")
            self.run.write_metrics([*epochs_before, *({"stage": number, **entry} for entry in history)])
            if not self.room:
                self.room = {split: len(hard[split]) for split in SPLITS}
            data = {split: on_device(hard[split], self.room[split]) for split in SPLITS}

            def remember() -> dict[str, Any]:
                return {"threshold": thresholds["train"], "seconds": self.seconds()}

            if not is_trained(history, config):
                for folder in self.run.checkpoints.glob("stage_*"):
                    if int(folder.name.removeprefix("stage_")) > number:  # trained on other weights than this stage's
                        shutil.rmtree(folder, ignore_errors=True)
                tracker = open_tracker(config.tracker, self.run, config.to_dict())
                with TrainingProgress(
                    self.run, tracker, config.num_epochs, history, stage=number, epochs_before=len(epochs_before)
                ) as progress:
                    state, history = fit(
                        self.trainer, state, data["train"], data["validation"], config, checkpoints, progress, history,
                        remember,
                    )  # fmt: skip
                checkpoints.wait()
            best, chosen = best_epoch([entry["val_loss"] for entry in history]), chosen_epoch(history, config)
            checkpoints.keep_only({best, len(history)})
            params = state.params if chosen == len(history) else checkpoints.params(chosen, state.params)
        del state, data
        self.stages.append(TrainedStage(jax.device_get(params), thresholds["train"]))
        self.reports.append({
            "stage": number,
            "threshold": thresholds["train"],
            "val_threshold": thresholds["validation"],
            "train_tokens": len(hard["train"]),
            "val_tokens": len(hard["validation"]),
            "epochs": history,
            "stopped": "early" if stopped_early(history, config) else "after num_epochs",
            "last": at_epoch(history, len(history)),
            "best": at_epoch(history, best),
            "seconds": sum(entry["seconds"] for entry in history),
        })  # fmt: skip
        if number == config.num_stages:
            return hard
        total = sum(map(len, hard.values()))
        with progress_bar(f"stage {number}: hidden states", total) as advance:
            return {split: run_stage(self.strict, params, hard[split], config.criterion, advance) for split in SPLITS}


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


def on_device(tokens: Tokens, room: int) -> tuple[tuple[jax.Array, jax.Array], int]:
    """A split as `fit` takes it: `(hidden, targets)` on the device, with room for `room` tokens, and its length."""
    missing = room - len(tokens)
    hidden = np.pad(tokens.hidden, [(0, missing), (0, 0)])
    return (jnp.asarray(hidden), jnp.asarray(np.pad(tokens.targets, (0, missing)))), len(tokens)


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
