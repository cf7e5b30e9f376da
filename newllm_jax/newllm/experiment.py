"""The New-LLM experiment from top to bottom: data, model, training, the best parameters on the test split, report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.plan import check_fits
from newllm_jax.newllm.run import before_0_2
from newllm_jax.newllm.updates import (
    build_training,
    initial_state,
    slow_loop_warning,
    training_model,
    training_precision,
)
from newllm_jax.newllm.wikitext import SPLITS, Wikitext, load_wikitext
from newllm_jax.records.directory import RunDir
from newllm_jax.records.mirror import Mirror
from newllm_jax.records.progress import Narrate, TrainingProgress, narrate_start
from newllm_jax.records.results import (
    RunResult,
    check_fingerprints,
    describe_run,
    finished_results,
    results_footer,
    results_header,
)
from newllm_jax.records.stored_config import resume_or_start
from newllm_jax.records.trackers import open_tracker
from newllm_jax.report.finish import REPORT, complete, write_results
from newllm_jax.report.newllm import write_report
from newllm_jax.training.checkpoint import Checkpoints, every_few_epochs
from newllm_jax.training.clock import Clock
from newllm_jax.training.history import at_epoch, best_epoch, how_it_stopped, is_finished
from newllm_jax.training.loop import evaluate, fit
from newllm_jax.training.manifest import Owner
from newllm_jax.training.step import TrainState, count_parameters
from newllm_jax.training.stopping import Asked, Stopping, never


def train_newllm(
    config: NewLLMConfig | None = None,
    *,
    name: str = "newllm",
    run_root: str | Path = "runs",
    resume: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    narrate: Narrate = print,
    stop: Asked = never,
) -> RunResult:
    """Trains New-LLM (report of New-LLM) and evaluates its best parameters on the test split.

    Args:
      config: a new run's settings.
      name, run_root: a new run goes to `run_root/name-time`.
      resume: a run directory to continue, as if it was never stopped; `overrides` may raise `num_epochs` or `patience`.
      narrate: receives the lines that tell what was resolved.
      stop: whether the run should stop; asked between pieces of work.

    Raises:
      InputError: a setting, data set or run directory that cannot be used.
      NumericalError: the loss is no longer finite; the last good checkpoint stays.
      Stopped: `stop` or `time_limit` ended the run; resuming continues it.
    """
    clock = Clock()
    with ExitStack() as stack:
        run, config = resume_or_start(stack, resume, config, NewLLMConfig, overrides)
        precision, data = training_precision(config), load_wikitext(config)
        check_fits(config, data, precision)
        model, summary = training_model(config, len(data.tokenizer), precision), data.summary(config)
        training, optimizer = build_training(config, model, summary["steps_per_epoch"])
        state = initial_state(config, model, optimizer)

        run = run or stack.enter_context(RunDir.create(run_root, f"{name}-builtin" if data.fallback else name))
        stopping = Stopping(clock, run.path, config, stop)
        mirror = stack.enter_context(Mirror(run, config.mirror, narrate, stopping.timer("mirror")))
        _narrate(narrate, run, config, data, state)
        files = {"vocabulary.json": data.tokenizer.words}
        description = describe_run(config, precision, data.fingerprints(), files)
        owner, keep = Owner(run.run_id, description=description), every_few_epochs(config.checkpoint_every)
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, owner, keep))
        if resume is not None:
            check_fingerprints(run, data.fingerprints(), before_0_2(checkpoints.record()))
        state, history = checkpoints.resume(state, config, clock, narrate)
        run.begin(description, files)
        mirror.start()
        if history and is_finished(history, config):
            narrate(f"finished {how_it_stopped(history, config)}")
            if finished := finished_results(run, "epochs", len(history)):
                return complete(run, finished, write_report)
        tracker = open_tracker(config.tracker, run, config.to_dict())
        run.write_metrics(history)
        splits = {name: data.split(name, config) for name in SPLITS}
        with TrainingProgress(run, tracker, config.num_epochs, history) as progress:
            state, history = fit(training, state, splits, config, checkpoints, progress, stopping, history)
        stopping.check("validation")
        best = at_epoch(history, best_epoch(history))
        params = checkpoints.params(best["epoch"], state.params)
        test = evaluate(training.evaluate, params, splits["test"], config.examples_at_once)
        results = write_results(run, write_report, {
            **results_header(run, config, precision),
            "data": summary,
            "parameters": count_parameters(state.params),
            "epochs": history, "stopped": how_it_stopped(history, config),
            "best": best, "test": test,
            **results_footer(clock.seconds()),
        })  # fmt: skip
    narrate(f"best        validation PPL {best['val_ppl']:.2f} after epoch {best['epoch']}; test PPL {test['ppl']:.2f}")
    narrate(f"report      {run.path / REPORT}")
    return RunResult(run.path, results)


def _narrate(narrate: Narrate, run: RunDir, config: NewLLMConfig, data: Wikitext, state: TrainState) -> None:
    """Tells what a run resolved."""
    source, counts = data.provenance["source"], [f"{data.count(split, config):,}" for split in SPLITS]
    replaced = data.fallback and (
        f"{data.fallback}: training on {source} instead. Its figures cannot be compared with published ones."
    )
    facts = {
        "data": f"{source}: {' / '.join(counts)} sequences, {data.steps(config):,} updates an epoch",
        "parameters": f"{count_parameters(state.params):,}",
    }
    narrate_start(narrate, run, training_precision(config), facts, [replaced, slow_loop_warning(config)])
