"""The New-LLM experiment from top to bottom: data, model, training, the best parameters on the test split, report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from newllm_jax.config import NewLLMConfig, Precision
from newllm_jax.errors import InputError
from newllm_jax.newllm.run import before_0_2, init_params
from newllm_jax.newllm.updates import build_training, slow_loop_warning, training_model, training_precision
from newllm_jax.newllm.wikitext import Wikitext, load_wikitext
from newllm_jax.records.directory import RunDir
from newllm_jax.records.progress import Narrate, TrainingProgress, narrate_damaged, narrate_start
from newllm_jax.records.results import (
    Clock,
    RunResult,
    begin,
    check_fingerprints,
    finished_results,
    results_footer,
    results_header,
)
from newllm_jax.records.stored_config import resumed_config, stored_config
from newllm_jax.records.trackers import check_tracker, open_tracker
from newllm_jax.report.newllm import write_report
from newllm_jax.training.checkpoint import Checkpoints
from newllm_jax.training.history import at_epoch, best_epoch, how_it_stopped, is_finished
from newllm_jax.training.loop import evaluate, fit
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.split import Split
from newllm_jax.training.step import init_state


def train_newllm(
    config: NewLLMConfig | None = None,
    *,
    name: str = "newllm",
    run_root: str | Path = "runs",
    resume: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    narrate: Narrate = print,
) -> RunResult:
    """Trains New-LLM (report of New-LLM) and evaluates its best parameters on the test split.

    Args:
      config: a new run's settings.
      name, run_root: a new run goes to `run_root/name-time`.
      resume: a run directory to go on with instead; `overrides` may raise `num_epochs` or `patience`. The result is
        that of a run which was never stopped.
      narrate: receives the lines that tell what was resolved.

    Raises:
      InputError: a setting, data set or run directory that cannot be used.
      NumericalError: the loss is no longer finite; the last good checkpoint stays.
    """
    clock = Clock()
    with ExitStack() as stack:
        run = None if resume is None else stack.enter_context(RunDir.open(resume))
        config = (config or NewLLMConfig()).override(overrides or {}) if run is None else _resumed(run, overrides or {})
        check_tracker(config.tracker)
        precision = training_precision(config)
        data = load_wikitext(config)
        if run is None:
            run = stack.enter_context(RunDir.create(run_root, f"{name}{'-builtin' if data.fallback else ''}"))
        model = training_model(config, len(data.tokenizer), precision)
        summary = data.summary(config.batch_size)
        training, optimizer = build_training(config, model, summary["steps_per_epoch"])
        state = init_state(init_params(model, config.seed), optimizer, initial_loss_scale(precision))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        _narrate(narrate, run, config, precision, data, parameters)

        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, config.checkpoint_every))
        if resume is not None:
            before = before_0_2(checkpoints.record()) if checkpoints.epochs else {}
            check_fingerprints(run, data.fingerprints(), before)
        resumption = checkpoints.resume(state)
        state, history = resumption.state, resumption.history
        clock.resume(resumption.seconds)
        narrate_damaged(narrate, resumption.damaged)
        if resume is not None:
            narrate(f"going on after epoch {len(history)}")
        if len(history) > config.num_epochs:
            raise InputError(f"num_epochs: {run.path} has {len(history)} epochs already, not {config.num_epochs}")
        if history and is_finished(history, config):
            narrate(f"finished {how_it_stopped(history, config)}")
            if finished := finished_results(run):
                return RunResult(run.path, finished)
        tracker = open_tracker(config.tracker, run, config.to_dict())
        begin(run, config, data.fingerprints())
        run.write_json("vocabulary.json", data.tokenizer.words)
        run.write_metrics(history)

        splits = {name: Split.of(rows) for name, rows in data.sequences.items()}
        with TrainingProgress(run, tracker, config.num_epochs, history) as progress:
            state, history = fit(
                training, state, splits["train"], splits["validation"], config, checkpoints, progress, history,
                record=lambda: {"seconds": clock.seconds()},
            )  # fmt: skip
        checkpoints.wait()

        best = best_epoch(history)
        params = checkpoints.params(best, state.params)
        results = {
            **results_header(run, config, precision),
            "data": summary,
            "parameters": parameters,
            "epochs": history,
            "stopped": how_it_stopped(history, config),
            "best": at_epoch(history, best),
            "test": evaluate(training.evaluate, params, splits["test"], config.batch_size),
            **results_footer(clock),
        }
        run.write_json("results.json", results)
        report = write_report(run, results)
    narrate(f"best        validation PPL {results['best']['val_ppl']:.2f} after epoch {best}; "
            f"test PPL {results['test']['ppl']:.2f}")  # fmt: skip
    narrate(f"report      {report}")
    return RunResult(run.path, results)


def _resumed(run: RunDir, overrides: Mapping[str, Any]) -> NewLLMConfig:
    """The configuration of a run with what resuming may change.

    Raises:
      InputError: an override that would make it another experiment; the field and both values are named.
    """
    stored, asked = stored_config(run, NewLLMConfig), resumed_config(run, NewLLMConfig, overrides)
    if asked.num_epochs != stored.num_epochs and stored.schedule == "cosine" and stored.decay_epochs is None:
        raise InputError(
            f"num_epochs: the learning rate of {run.path} decays over its {stored.num_epochs} epochs, so it cannot "
            f"become {asked.num_epochs}; a new run with decay_epochs set could be extended"
        )
    return asked


def _narrate(
    narrate: Narrate, run: RunDir, config: NewLLMConfig, precision: Precision, data: Wikitext, parameters: int
) -> None:  # fmt: skip
    """Tells what a run resolved."""
    source, counts = data.provenance["source"], [f"{len(rows):,}" for rows in data.sequences.values()]
    replaced = data.fallback and (
        f"{data.fallback}: training on {source} instead. Its figures cannot be compared with published ones."
    )
    steps = data.summary(config.batch_size)["steps_per_epoch"]
    facts = {
        "data": f"{source}: {' / '.join(counts)} sequences, {steps:,} updates an epoch",
        "parameters": f"{parameters:,}",
    }
    narrate_start(narrate, run, precision, facts, [replaced, slow_loop_warning(config)])
