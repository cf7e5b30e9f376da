"""The New-LLM experiment from top to bottom: data, model, training, the best parameters on the test split, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm.loss import next_word_loss
from newllm_jax.newllm.run import SYSTEM, NewLLMRun, check_same_data, init_params, resumed_newllm_config
from newllm_jax.newllm.updates import build, training_model, training_precision
from newllm_jax.newllm.wikitext import Wikitext, load_wikitext
from newllm_jax.records.directory import RunDir
from newllm_jax.records.machine import command_line, environment, peak_memory_bytes
from newllm_jax.records.progress import TrainingProgress, boxed
from newllm_jax.records.results import SCHEMA_VERSION
from newllm_jax.records.trackers import open_tracker
from newllm_jax.report.plots import save_curves
from newllm_jax.report.tables import newllm_report
from newllm_jax.training.checkpoint import Checkpoints
from newllm_jax.training.history import best_epoch
from newllm_jax.training.loop import evaluate, fit, stopped_early
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.step import init_state, make_evaluation

Narrate = Callable[[str], None]


@dataclass(frozen=True)
class NewLLMResult:
    """What a training run gave.

    Attributes:
      run_dir: where its files lie.
      results: the content of `results.json`.
    """

    run_dir: Path
    results: dict[str, Any]


def train_newllm(
    config: NewLLMConfig | None = None,
    *,
    name: str = "newllm",
    run_root: str | Path = "runs",
    resume: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    narrate: Narrate = print,
) -> NewLLMResult:
    """Trains New-LLM (report of New-LLM) and evaluates its best parameters on the test split.

    Args:
      config: a new run's settings.
      name, run_root: a new run goes to `run_root/name-time`.
      resume: a run directory to go on with instead; `overrides` may raise `num_epochs` or `patience`. The result is
        that of a run which was never stopped.
      narrate: takes the lines that tell what was resolved.

    Raises:
      InputError: a setting, data set or run directory that cannot be used.
      NumericalError: the loss is no longer finite; the last good checkpoint stays.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        if resume is not None:
            run = stack.enter_context(RunDir.open(resume))
            config = resumed_newllm_config(run, overrides or {})
            precision = training_precision(config)
            data = load_wikitext(config)
        else:
            config = (config or NewLLMConfig()).override(overrides or {})
            precision = training_precision(config)
            data = load_wikitext(config)
            run = stack.enter_context(RunDir.create(run_root, f"{name}{'-builtin' if data.fallback else ''}"))
        model = training_model(config, len(data.tokenizer), precision)
        summary = data.summary(config.batch_size)
        trainer, optimizer = build(config, model, summary["steps_per_epoch"])
        state = init_state(init_params(model, config.seed), optimizer, initial_loss_scale(precision))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        narrate_start(narrate, data, summary, run, parameters, precision)

        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, config.checkpoint_every))
        if checkpoints.epochs:
            check_same_data(checkpoints.record()["fingerprint"], data)
        found, damaged = checkpoints.latest(state)
        if damaged:
            narrate(f"damaged, and passed over: the checkpoints of epochs {damaged}")
        if resume is not None:
            narrate(f"going on after epoch {found.epoch if found else 0}")
        history, seconds_before = [], 0.0
        if found:
            state, history, seconds_before = found.state, found.record["history"], found.record["seconds"]
            checkpoints.drop_after(found.epoch)
        if len(history) > config.num_epochs:
            raise InputError(f"num_epochs: {run.path} has {len(history)} epochs already, not {config.num_epochs}")
        if history and (len(history) >= config.num_epochs or stopped_early(history, config)):
            narrate(f"finished {how_it_stopped(history, config)}")
            if (run.path / "results.json").is_file():
                return NewLLMResult(run.path, run.read_json("results.json"))
        tracker = open_tracker(config.tracker, run, config.to_dict())
        run.write_json("config.json", {"schema_version": SCHEMA_VERSION, "system": SYSTEM, "config": config.to_dict()})
        run.write_json("vocabulary.json", data.tokenizer.words)
        run.write_metrics(history)

        def seconds() -> float:
            return seconds_before + time.monotonic() - started

        def remember() -> dict[str, Any]:
            return {"fingerprint": data.provenance["fingerprint"], "seconds": seconds()}

        splits = {split: (jnp.asarray(rows), len(rows)) for split, rows in data.sequences.items()}
        with TrainingProgress(run, tracker, config.num_epochs, history) as progress:
            state, history = fit(
                trainer, state, splits["train"], splits["validation"], config, checkpoints, progress, history, remember
            )
        checkpoints.wait()

        best = history[best_epoch([entry["val_loss"] for entry in history]) - 1]
        params = checkpoints.params(best["epoch"], state.params)
        results = {
            "schema_version": SCHEMA_VERSION,
            "system": SYSTEM,
            "name": run.path.name,
            "config": config.to_dict(),
            "command": command_line(),
            "environment": environment(precision),
            "data": summary,
            "parameters": parameters,
            "epochs": history,
            "stopped": how_it_stopped(history, config),
            "best": {key: best[key] for key in ("epoch", "val_loss", "val_ppl")},
            "test": evaluate(trainer.evaluate, params, *splits["test"], config.batch_size),
            "seconds": seconds(),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        run.write_json("results.json", results)
        save_curves(run.path / "curves.png", history, run.path.name)
        run.write_text("report.md", newllm_report(results))
    narrate(f"best        validation PPL {best['val_ppl']:.2f} after epoch {best['epoch']}; "
            f"test PPL {results['test']['ppl']:.2f}")  # fmt: skip
    narrate(f"report      {run.path / 'report.md'}")
    return NewLLMResult(run.path, results)


def evaluate_splits(run: NewLLMRun) -> dict[str, Any]:
    """Loss, perplexity and accuracy of a restored run on the validation and test splits, strict float32.

    Raises:
      InputError: the data at hand are not those that the run was trained on.
    """
    data = load_wikitext(run.config)
    check_same_data(run.fingerprint, data)
    evaluation = make_evaluation(next_word_loss(run.model))
    rows = {split: data.sequences[split] for split in ("validation", "test")}
    return {
        split: evaluate(evaluation, run.params, jnp.asarray(ids), len(ids), run.config.batch_size)
        for split, ids in rows.items()
    }


def how_it_stopped(history: list[dict[str, Any]], config: NewLLMConfig) -> str:
    """Why training ended, and the setting that would let it go on."""
    if stopped_early(history, config):
        return f"early, after epoch {len(history)}: no gain in {config.patience} epochs (raise patience to go on)"
    return f"after epoch {len(history)}, the last of num_epochs (raise it to go on)"


def narrate_start(
    narrate: Narrate, data: Wikitext, summary: dict[str, Any], run: RunDir, parameters: int, precision: str
) -> None:
    """Tells what a run resolved: device, data, parameters, run directory."""
    device = jax.devices()[0]
    if data.fallback:
        narrate(boxed(f"{data.fallback}: training on {data.provenance['source']} instead. "
                      "Its figures cannot be compared with published ones."))  # fmt: skip
    narrate(f"device      {device.device_kind} ({device.platform}), {precision}")
    narrate(f"data        {summary['source']}: {summary['train_sequences']:,} / {summary['validation_sequences']:,} / "
            f"{summary['test_sequences']:,} sequences, {summary['steps_per_epoch']:,} updates an epoch")  # fmt: skip
    narrate(f"parameters  {parameters:,}")
    narrate(f"run         {run.path}")
