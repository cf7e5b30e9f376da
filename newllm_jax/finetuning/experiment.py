"""Fine-tuning of a SmolLM2, whole or in part, on the chunks of CASCADE: the comparison that its report names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from newllm_jax.bars import progress_bar
from newllm_jax.config import FinetuneConfig
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.finetuning.adaptation import Adaptation, choose_adaptation
from newllm_jax.finetuning.loss import sequence_loss
from newllm_jax.finetuning.plan import check_fits
from newllm_jax.finetuning.updates import build_training
from newllm_jax.processes import is_first
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
from newllm_jax.report.finetune import model_text, write_report
from newllm_jax.report.finish import PAGE, complete, write_results
from newllm_jax.smollm.adapter_file import save_adapter
from newllm_jax.smollm.base import (
    base_results,
    fingerprints,
    load_base_and_data,
    run_name,
    source_facts,
    source_warnings,
)
from newllm_jax.smollm.generate import generate_tokens, prompt_ids, stream_text
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.training.checkpoint import Checkpoints, every_few_epochs, read_chosen
from newllm_jax.training.clock import Clock
from newllm_jax.training.history import at_epoch, best_epoch, is_finished
from newllm_jax.training.loop import evaluate, fit
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.manifest import Owner
from newllm_jax.training.mesh import choose_mesh
from newllm_jax.training.precision import resolve_precision
from newllm_jax.training.samples import epoch_samples
from newllm_jax.training.split import Split
from newllm_jax.training.step import Params, init_state, make_evaluation, place_state
from newllm_jax.training.stopping import Asked, Stopping, never

ADAPTER = "adapter"  # the folder of a run's adapters
QUESTION = "Explain in one sentence what a language model is."  # that the report has answers to


def finetune(
    config: FinetuneConfig | None = None,
    *,
    name: str = "finetune",
    run_root: str | Path = "runs",
    resume: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    narrate: Narrate = print,
    stop: Asked = never,
) -> RunResult:
    """Fine-tunes a SmolLM2, whole or in part, on whole chunks and reports its loss on the validation chunks.

    Arguments and errors are those of `train_newllm`; resuming may raise `num_epochs` or `patience`.
    """
    clock = Clock()
    with ExitStack() as stack:
        run, config = resume_or_start(stack, resume, config, FinetuneConfig, overrides)
        precision = resolve_precision(config.precision)
        base, data = load_base_and_data(config)
        adaptation = choose_adaptation(config, base.model.config)
        check_fits(config, adaptation, data, precision)
        if run is not None:
            check_fingerprints(run, fingerprints(base, data))
        run = run or stack.enter_context(RunDir.create(run_root, run_name(name, base, data)))
        stopping = Stopping(clock, run.path, config, stop)
        mirror = stack.enter_context(Mirror(run, config.mirror, narrate, stopping.timer("mirror")))
        mesh = choose_mesh(config.mesh, config.examples_at_once)
        facts = source_facts(base, data) | {"model": model_text(config.to_dict(), adaptation.results()), **mesh.facts()}
        narrate_start(narrate, run, precision, facts, source_warnings(base, data, config))
        splits = {"train": Split.from_arrays(data.train), "validation": Split.from_arrays(data.validation)}
        params = adaptation.prune(base.params)
        frozen = adaptation.freeze(params)
        training, optimizer = build_training(config, adaptation, frozen, precision)
        state = init_state(adaptation.start(params, config.seed), optimizer, initial_loss_scale(precision), mesh=mesh)
        with progress_bar("base: validation", 0):
            held_out, size = splits["validation"], config.examples_at_once
            start = evaluate(training.evaluate, state.params, held_out, size, training.mesh)
            before = measure_base(base, held_out, config) if adaptation.dropped else start
        for name, found in {"base": before, **({"start": start} if before is not start else {})}.items():
            narrate(f"{name:<11} validation loss {found['loss']:.4f}, PPL {found['ppl']:.2f}")
        description = describe_run(config, precision, fingerprints(base, data))
        owner = Owner(run.run_id, description=description)
        keep = every_few_epochs(config.checkpoint_every, first=config.sample_words > 0)
        with Checkpoints(run.checkpoints, owner, keep) as checkpoints:
            state, history = checkpoints.resume(state, config, clock, narrate)
            state = place_state(mesh, state)
            run.begin(description)
            mirror.start()
            run.write_metrics(history)
            if is_finished(history, config):
                narrate("finished (raise num_epochs or patience to continue)")
                if finished := finished_results(run, "epochs", len(history)):
                    return complete(run, finished, write_report)
            tracker = open_tracker(config.tracker, run, config.to_dict())
            with TrainingProgress(run, tracker, config.num_epochs, history, narrate=narrate) as progress:
                state, history = fit(training, state, splits, config, checkpoints, progress, stopping, history)
        save_best_adapter(run, adaptation, base.source.model_name)
        best = at_epoch(history, best_epoch(history))
        results = write_results(run, write_report, {
            **results_header(run, config, precision), **mesh.summary(),
            "data": data.summary(), **adaptation.results(),
            "base": base_results(base, before["loss"], before["ppl"]),
            "start": {"val_loss": start["loss"], "val_ppl": start["ppl"]},
            "epochs": history, "last": at_epoch(history, len(history)), "best": best,
            **answers(checkpoints, base, adaptation, frozen, config),
            **results_footer(clock.seconds()),
        })  # fmt: skip
    narrate(f"best        validation PPL {best['val_ppl']:.2f} after epoch {best['epoch']}; base {before['ppl']:.2f}")
    narrate(f"report      {run.path / PAGE}")
    return RunResult(run.path, results)


def answers(
    checkpoints: Checkpoints, base: Pretrained, adaptation: Adaptation, frozen: Params, config: FinetuneConfig
) -> dict[str, Any]:
    """`{"samples": ...}`: what the model of a first, a middle and the last epoch answers to a question; {} for none.

    Args:
      frozen: the parameters that are not trained.
    """
    model, tokenizer = SmolLM2(adaptation.llama), base.tokenizer

    def answer(trained: Params) -> Iterator[str]:
        tuned = Pretrained(model, adaptation.merge(frozen, trained), tokenizer, base.source)
        ids = prompt_ids(tokenizer, QUESTION)
        return stream_text(tokenizer, generate_tokens(tuned, ids, config.sample_words, Sampling(), config.seed))

    like = adaptation.shapes()[1]
    found = epoch_samples(checkpoints, like, QUESTION, answer) if config.sample_words else []
    return {"samples": found} if found else {}


def measure_base(base: Pretrained, validation: Split, config: FinetuneConfig) -> dict[str, float]:
    """Loss, perplexity and accuracy of a base with all its layers, strict float32."""
    evaluation, params = make_evaluation(sequence_loss(base.model)), jax.device_put(base.params)
    return evaluate(evaluation, params, validation, config.examples_at_once)


def save_best_adapter(run: RunDir, adaptation: Adaptation, base: str) -> None:
    """Writes the adapters of the best epoch for `peft`, where there are any, in one process.

    No source has a base without some layers: it is not named.
    """
    if not adaptation.rank or not is_first():
        return
    _, adapters, _ = read_chosen(run.checkpoints, Owner(run.run_id), adaptation.shapes()[1])
    layers = adaptation.llama.num_layers
    save_adapter(run.path / ADAPTER, adapters, None if adaptation.dropped else base, layers)
