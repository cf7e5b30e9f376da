"""The New-LLM experiment from top to bottom: data, model, training, the best parameters on the test split, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import optax

from newllm_jax.bars import progress_bar
from newllm_jax.config import NewLLMConfig, Precision
from newllm_jax.newllm.generate import generate
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.plan import check_fits, parameter_count
from newllm_jax.newllm.run import VOCABULARY, NewLLMRun, before_0_2
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
from newllm_jax.records.narration import Narrate
from newllm_jax.records.progress import TrainingProgress, narrate_start
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
from newllm_jax.report.finish import PAGE, complete, write_results
from newllm_jax.report.newllm import write_report
from newllm_jax.training.checkpoint import Checkpoints, every_few_epochs
from newllm_jax.training.clock import Clock
from newllm_jax.training.history import Entry, at_epoch, best_epoch, how_it_stopped, is_finished
from newllm_jax.training.loop import Training, evaluate, fit
from newllm_jax.training.manifest import Owner
from newllm_jax.training.samples import epoch_samples
from newllm_jax.training.step import Params, TrainState, count_parameters
from newllm_jax.training.stopping import Asked, Stopping, never


class Setup(NamedTuple):
    """What a configuration is resolved to before anything is written.

    Attributes:
      training, optimizer: the compiled functions and the optimiser of `updates.build_training`.
    """

    config: NewLLMConfig
    precision: Precision
    data: Wikitext
    model: ContextVectorLM
    training: Training
    optimizer: optax.GradientTransformation

    @classmethod
    def from_config(cls, config: NewLLMConfig, data: Wikitext | None = None) -> Self:
        """Raises InputError where a run cannot begin: its data, its precision, its size.

        Args:
          data: what the configuration reads, where it is loaded already.
        """
        precision, data = training_precision(config), data or load_wikitext(config)
        check_fits(config, data, precision)
        model = training_model(config, len(data.tokenizer), precision)
        return cls(config, precision, data, model, *build_training(config, model, data.steps(config)))


@dataclass
class OpenRun:
    """A run whose directory this process holds: where it stands, and how it ends.

    Attributes:
      state, history: after its last checkpoint; of a new run at its start.
    """

    run: RunDir
    setup: Setup
    clock: Clock
    checkpoints: Checkpoints
    state: TrainState
    history: list[Entry]

    @classmethod
    def begin(cls, stack: ExitStack, run: RunDir, setup: Setup, clock: Clock, narrate: Narrate) -> Self:
        """Writes the files that make a directory a run, after what it has of an earlier process was checked.

        Args:
          stack: closes the checkpoints.
          clock: of the run.

        Raises:
          InputError: the data are not those that the run was trained on, or no checkpoint is whole.
        """
        config, data = setup.config, setup.data
        files = {VOCABULARY: data.tokenizer.words}
        description = describe_run(config, setup.precision, data.fingerprints(), files)
        owner = Owner(run.run_id, description=description)
        keep = every_few_epochs(config.checkpoint_every, first=config.sample_words > 0)
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, owner, keep))
        if run.description:
            check_fingerprints(run, data.fingerprints(), before_0_2(checkpoints.record()))
        state = initial_state(config, setup.model, setup.optimizer)
        state, history = checkpoints.resume(state, config, clock, narrate)
        run.begin(description, files)
        return cls(run, setup, clock, checkpoints, state, history)

    def finished(self) -> dict[str, Any] | None:
        """The results of a run that was at its end already, or None."""
        at_end = self.history and is_finished(self.history, self.setup.config)
        return finished_results(self.run, "epochs", len(self.history)) if at_end else None

    def finish(self) -> dict[str, Any]:
        """Measures the best parameters on the test split; the results of the run, which are not written yet."""
        setup, config = self.setup, self.setup.config
        best = at_epoch(self.history, best_epoch(self.history))
        params = self.checkpoints.params(best["epoch"], self.state.params)
        training, split = setup.training, setup.data.split("test", config)
        with progress_bar("test split", 0):
            test = evaluate(training.evaluate, params, split, config.examples_at_once, training.mesh)
        return {
            **results_header(self.run, config, setup.precision), **setup.training.mesh.summary(),
            "data": setup.data.summary(config),
            "parameters": count_parameters(self.state.params),
            "epochs": self.history, "stopped": how_it_stopped(self.history, config),
            "best": best, "test": test, **self.samples(),
            **results_footer(self.clock.seconds()),
        }  # fmt: skip

    def samples(self) -> dict[str, Any]:
        """`{"samples": ...}`: texts of a first, a middle and the last epoch, from the start of a text; {} for none."""
        data, config = self.setup.data, self.setup.config
        model = ContextVectorLM.from_config(config, len(data.tokenizer))  # strict float32, as a restored run has it
        run = NewLLMRun(model, {}, config, data.tokenizer, 0, data.provenance["fingerprint"])

        def words(params: Params) -> Iterator[str]:
            return generate(replace(run, params=params), max_words=config.sample_words, seed=config.seed)

        found = epoch_samples(self.checkpoints, self.state.params, "", words, " ") if config.sample_words else []
        return {"samples": found} if found else {}


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
      name: that of a new run, which goes to `run_root/name-time`.
      run_root: the folder for it.
      resume: a run directory to continue, as if it was never stopped; `overrides` may raise `num_epochs` or `patience`.
      narrate: receives the lines that tell what was resolved, each epoch, and what came of it.
      stop: whether the run should stop; asked between pieces of work.

    Raises:
      InputError: a setting, data set or run directory that cannot be used.
      NumericalError: the loss is no longer finite; the last good checkpoint stays.
      Stopped: `stop` or `time_limit` ended the run; resuming continues it.
    """
    clock = Clock()
    with ExitStack() as stack:
        run, config = resume_or_start(stack, resume, config, NewLLMConfig, overrides)
        setup = Setup.from_config(config)
        fallback = setup.data.fallback
        run = run or stack.enter_context(RunDir.create(run_root, f"{name}-builtin" if fallback else name))
        stopping = Stopping(clock, run.path, config, stop)
        mirror = stack.enter_context(Mirror(run, config.mirror, narrate, stopping.timer("mirror")))
        _narrate(narrate, run, setup)
        opened = OpenRun.begin(stack, run, setup, clock, narrate)
        mirror.start()
        history = opened.history
        if history and is_finished(history, config):
            narrate(f"finished {how_it_stopped(history, config)}")
            if finished := opened.finished():
                return complete(run, finished, write_report)
        tracker = open_tracker(config.tracker, run, config.to_dict())
        run.write_metrics(history)
        splits = {name: setup.data.split(name, config) for name in ("train", "validation")}
        with TrainingProgress(run, tracker, config.num_epochs, history, narrate=narrate) as progress:
            opened.state, opened.history = fit(
                setup.training, opened.state, splits, config, opened.checkpoints, progress, stopping, history
            )
        stopping.check("validation")
        results = write_results(run, write_report, opened.finish())
    best, test = results["best"], results["test"]
    narrate(f"best        validation PPL {best['val_ppl']:.2f} after epoch {best['epoch']}; test PPL {test['ppl']:.2f}")
    narrate(f"report      {run.path / PAGE}")
    return RunResult(run.path, results)


def _narrate(narrate: Narrate, run: RunDir, setup: Setup) -> None:
    """Tells what a run resolved."""
    config, data = setup.config, setup.data
    facts = {
        "data": f"{data.provenance['source']}: {data_facts(data, config)}",
        "parameters": parameter_count(config, len(data.tokenizer)),
        **setup.training.mesh.facts(),
    }
    narrate_start(narrate, run, setup.precision, facts, start_warnings(config, data))


def data_facts(data: Wikitext, config: NewLLMConfig) -> str:
    """How much there is to read, for a line."""
    counts = [f"{data.count(split, config):,}" for split in SPLITS]
    return f"{' / '.join(counts)} sequences, {data.steps(config):,} updates an epoch"


def start_warnings(config: NewLLMConfig, data: Wikitext) -> list[str]:
    """What a user must know before the run begins; "" for what is as it should be."""
    source = data.provenance["source"]
    replaced = data.fallback and (
        f"{data.fallback}: training on {source} instead. Its figures cannot be compared with published ones."
    )
    return [replaced, slow_loop_warning(config)]
