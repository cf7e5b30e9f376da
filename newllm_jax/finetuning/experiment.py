"""Fine-tuning of a whole SmolLM2 on the chunks of CASCADE: the comparison that the report of CASCADE names."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from newllm_jax.cascade.run import (
    RESUMABLE,
    at_epoch,
    check_fingerprint,
    is_trained,
    load_base,
    narrate_sources,
    run_name,
)
from newllm_jax.config import FinetuneConfig
from newllm_jax.records.directory import RunDir
from newllm_jax.records.machine import command_line, environment, peak_memory_bytes
from newllm_jax.records.progress import TrainingProgress, progress_bar
from newllm_jax.records.results import SCHEMA_VERSION
from newllm_jax.records.stored_config import resumed_config, stored_config
from newllm_jax.records.trackers import check_tracker, open_tracker
from newllm_jax.report.cascade_tables import finetune_report
from newllm_jax.report.plots import save_curves
from newllm_jax.smollm.alpaca import load_alpaca
from newllm_jax.smollm.model import SmolLM2, count_parameters, parameter_shapes
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.training.checkpoint import Checkpoints
from newllm_jax.training.history import best_epoch
from newllm_jax.training.loop import Trainer, evaluate, fit
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.optimizer import adamw
from newllm_jax.training.precision import PRECISIONS, resolve_precision
from newllm_jax.training.step import LossFn, Params, Sums, init_state, make_evaluation, make_updates, train_step

SYSTEM = "finetune"
FINETUNE_RESUMABLE = (RESUMABLE | {"num_epochs", "patience"}) - {"num_stages"}


@dataclass(frozen=True)
class FinetuneResult:
    """What a run gave.

    Attributes:
      run_dir: where its files lie.
      results: the content of `results.json`.
    """

    run_dir: Path
    results: dict[str, Any]


@dataclass(frozen=True)
class FinetuneRun:
    """A fine-tuned model, ready to call: `run.base.model.apply({"params": run.base.params}, ids)`.

    Attributes:
      base: the model, its best parameters and its tokenizer.
      config: of the run.
      epoch: the epoch that the parameters are from.
      run: where it lies.
    """

    base: Pretrained
    config: FinetuneConfig
    epoch: int
    run: RunDir


def sequence_loss(model: SmolLM2) -> LossFn:
    """The loss over whole sequences; its batch is `ids [batch, 129]`, the targets all but the first of each."""

    def loss(params: Params, ids: jax.Array, present: jax.Array, key: jax.Array | None) -> Sums:
        logits, _ = cast(tuple[jax.Array, Any], model.apply({"params": params}, ids[:, :-1]))
        targets = ids[:, 1:]
        counted = jnp.broadcast_to(present[:, None], targets.shape)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hits = (jnp.argmax(logits, -1) == targets) & counted
        return Sums(loss=jnp.sum(losses, where=counted), hits=jnp.sum(hits), count=jnp.sum(counted))

    return loss


def finetune(
    config: FinetuneConfig | None = None,
    *,
    name: str = "finetune",
    run_root: str | Path = "runs",
    resume: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    narrate: Callable[[str], None] = print,
) -> FinetuneResult:
    """Fine-tunes all parameters of a SmolLM2 on whole chunks and reports its loss on the validation chunks.

    Arguments and errors are those of `train_cascade`; resuming may raise `num_epochs` or `patience`.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        run = None if resume is None else stack.enter_context(RunDir.open(resume))
        if run is not None:
            config = resumed_config(run, SYSTEM, FinetuneConfig, overrides or {}, FINETUNE_RESUMABLE)
        else:
            config = (config or FinetuneConfig()).override(overrides or {})
        check_tracker(config.tracker)
        precision = resolve_precision(config.precision)
        with progress_bar("base model and data", 0):
            base = load_base(config)
            data = load_alpaca(base.tokenizer, config)
        if run is None:
            run = stack.enter_context(RunDir.create(run_root, run_name(name, base, data)))
        else:
            check_fingerprint(run, "data", data.fingerprint, f"dataset: {data.provenance['source']}")
            check_fingerprint(run, "base", base.source.fingerprint, f"base_model: {base.source.used}")
        parameters = count_parameters(base.params)
        narrate_sources(narrate, base, data, config, precision)
        narrate(f"parameters  {parameters:,}, all of them trained")
        narrate(f"run         {run.path}")
        run.write_json("config.json", {
            "schema_version": SCHEMA_VERSION,
            "system": SYSTEM,
            "config": config.to_dict(),
            "fingerprints": {"data": data.fingerprint, "base": base.source.fingerprint},
        })  # fmt: skip

        optimizer = adamw(config.learning_rate, config.weight_decay)
        in_training = base.model.clone(precision=PRECISIONS[precision])
        trainer = Trainer(
            make_updates(partial(train_step, sequence_loss(in_training), optimizer)),
            make_evaluation(sequence_loss(base.model)),
            optax.constant_schedule(config.learning_rate),
            None,
        )
        state = init_state(jax.tree.map(jnp.array, base.params), optimizer, initial_loss_scale(precision))
        train, validation = (
            (jnp.asarray(data.train), len(data.train)),
            (jnp.asarray(data.validation), len(data.validation)),
        )
        before = evaluate(trainer.evaluate, state.params, *validation, config.batch_size)
        narrate(f"base        validation loss {before['loss']:.4f}, PPL {before['ppl']:.2f}")
        history: list[dict[str, Any]] = []
        seconds_before = 0.0

        def remember() -> dict[str, Any]:
            return {"seconds": seconds_before + time.monotonic() - started}

        with Checkpoints(run.checkpoints, config.checkpoint_every) as checkpoints:
            found, damaged = checkpoints.latest(state)
            if damaged:
                narrate(f"damaged, and passed over: the checkpoints of epochs {damaged}")
            if found:
                state, history, seconds_before = found.state, found.record["history"], found.record["seconds"]
                checkpoints.drop_after(found.epoch)
                narrate(f"going on after epoch {found.epoch}")
            run.write_metrics(history)
            if is_trained(history, config):
                narrate("finished (raise num_epochs or patience to go on)")
                if (run.path / "results.json").is_file():
                    return FinetuneResult(run.path, run.read_json("results.json"))
            tracker = open_tracker(config.tracker, run, config.to_dict())
            with TrainingProgress(run, tracker, config.num_epochs, history) as progress:
                state, history = fit(
                    trainer, state, train, validation, config, checkpoints, progress, history, remember
                )  # fmt: skip
            checkpoints.wait()
        best = at_epoch(history, best_epoch([entry["val_loss"] for entry in history]))
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
                "parameters": parameters,
                "layers": base.model.config.num_layers,
                "val_loss": before["loss"],
                "val_ppl": before["ppl"],
            },
            "parameters": parameters,
            "trained_parameters": count_parameters(state.params),
            "epochs": history,
            "last": at_epoch(history, len(history)),
            "best": best,
            **remember(),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        run.write_json("results.json", results)
        save_curves(run.path / "curves.png", history, run.path.name, unit="token", dropout=False)
        run.write_text("report.md", finetune_report(results))
    narrate(f"best        validation PPL {best['val_ppl']:.2f} after epoch {best['epoch']}; base {before['ppl']:.2f}")
    narrate(f"report      {run.path / 'report.md'}")
    return FinetuneResult(run.path, results)


def restore_finetune(run_dir: str | Path) -> FinetuneRun:
    """The best parameters of a fine-tuned model, on the default device. Changes nothing on disk.

    Raises:
      InputError: not a fine-tuning run, one without a checkpoint, or a base that cannot be had (its tokenizer).
    """
    run = RunDir.open(run_dir)
    config = stored_config(run, SYSTEM, FinetuneConfig)
    base = load_base(config)
    with Checkpoints(run.checkpoints, read_only=True) as checkpoints:
        epoch = best_epoch([entry["val_loss"] for entry in checkpoints.record()["history"]])
        params = checkpoints.params(epoch, parameter_shapes(base.model.config))
    return FinetuneRun(Pretrained(base.model, params, base.tokenizer, base.source), config, epoch, run)


def evaluate_finetuned(run: FinetuneRun) -> dict[str, float]:
    """Loss, perplexity and accuracy of a restored run on its validation chunks, strict float32."""
    data = load_alpaca(run.base.tokenizer, run.config)
    check_fingerprint(run.run, "data", data.fingerprint, f"dataset: {data.provenance['source']}")
    chunks = data.validation
    evaluation = make_evaluation(sequence_loss(run.base.model))
    return evaluate(evaluation, run.base.params, jnp.asarray(chunks), len(chunks), run.config.batch_size)
