"""New-LLM as the library trains it, timed: one configuration, or one after another for a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.memory import jax_memory
from benchmarks.ours import JaxTraining, write_weights
from benchmarks.timing import loss_curve, time_updates, updates_needed
from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.run import init_params
from newllm_jax.newllm.updates import build, training_model, training_precision
from newllm_jax.training.step import epoch_order, init_state


def orders(seed: int, examples: int, batch: int, updates: int) -> np.ndarray:
    """`[updates, batch]`: the library's order of the examples, epoch after epoch, in full batches."""
    epochs = -(-updates * batch // examples)
    flat = np.concatenate([epoch_order(seed, epoch, examples) for epoch in range(1, epochs + 1)])
    return flat[: updates * batch].reshape(updates, batch)


def training(config: NewLLMConfig, vocabulary: int, sequences: np.ndarray, updates: int, seed: int = 0) -> JaxTraining:
    """The training of a configuration from its own initial weights. `seed` is that of dropout alone."""
    model = training_model(config, vocabulary, training_precision(config))
    trainer, optimizer = build(config, model, steps_per_epoch(config, len(sequences)))
    state = init_state(init_params(model, config.seed), optimizer)
    order = orders(config.seed, len(sequences), config.batch_size, updates)
    return JaxTraining(trainer.updates, state, sequences, order, seed)


def steps_per_epoch(config: NewLLMConfig, examples: int) -> int:
    """Updates in an epoch, the last and smaller one counted in."""
    return -(-examples // config.batch_size)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """The row of the library, and in the task's folder the weights that the peers begin with.

    Beside the timed curve there are one with other dropout masks, which shows how much the losses differ by chance, and
    one without dropout in strict float32, which every re-creation must follow.
    """
    config = NewLLMConfig.from_dict(task["config"])
    sequences, vocabulary = np.load(task["sequences"]), task["vocabulary"]
    updates, repeats = task["updates"], task["repeats"]
    needed = updates_needed(updates, repeats, task["agreement_updates"])
    ours = training(config, vocabulary, sequences, needed)
    parameters = write_weights(Path(task["weights"]), ours.state.params)
    row = {"parameters": parameters, "precision": training_precision(config), "dropout": config.dropout}
    row |= time_updates(ours, updates, repeats) | jax_memory() | {"planned_memory_bytes": ours.planned_bytes}
    other = training(config, vocabulary, sequences, needed, seed=1)
    row["losses_other_dropout"] = time_updates(other, updates, repeats)["losses"]
    plain = config.override({"dropout": 0.0, "precision": "fp32"})
    row["losses_strict"] = loss_curve(training(plain, vocabulary, sequences, needed), task["agreement_updates"])
    return row


def measure_sizes(task: dict[str, Any]) -> dict[str, Any]:
    """The same training at several sizes: `config` overridden by each of `sizes`, one row each.

    Without `sequences` the ids are drawn at random, none of them padding.
    """
    rows = []
    for size in task["sizes"]:
        config = NewLLMConfig.from_dict(task["config"]).override(size)
        vocabulary = task["vocabulary"]
        if task["sequences"]:
            sequences = np.load(task["sequences"])
        else:
            shape = (config.batch_size * 2, config.sequence_length)
            sequences = np.random.default_rng(0).integers(1, vocabulary, shape).astype(np.uint16)
        row: dict[str, Any] = {**size, "batch_size": config.batch_size, "sequence_length": config.sequence_length}
        row["precision"] = training_precision(config)
        updates, repeats = task["updates"], task["repeats"]
        needed = updates_needed(updates, repeats)
        try:
            ours = training(config, vocabulary, sequences, needed)
            measured = time_updates(ours, updates, repeats)
            targets = np.count_nonzero(sequences[np.asarray(ours.order)][..., 1:]) / needed
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append({**row, "error": "out of memory"})
            continue
        positions = config.batch_size * (config.sequence_length - 1)
        seconds = measured["update_seconds"]["median"]
        rows.append({
            **row, **measured,
            "seconds_per_token": seconds / positions,
            "tokens_per_second": targets / seconds,
            "planned_memory_bytes": ours.planned_bytes,
        })  # fmt: skip
        del ours
    return {"rows": rows}
