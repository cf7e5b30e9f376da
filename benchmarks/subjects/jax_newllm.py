"""New-LLM as the library trains it, timed: a configuration, a sweep of sizes, every form of the time loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.harness.memory import jax_memory
from benchmarks.harness.timing import loss_curve, time_in_turns, time_updates, updates_needed
from benchmarks.subjects.jax_training import JaxTraining, write_weights
from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.recurrence.cell import Form
from newllm_jax.newllm.updates import build_training, initial_state, time_loop_forms, training_model, training_precision
from newllm_jax.training.split import epoch_order


def orders(seed: int, examples: int, batch: int, updates: int) -> np.ndarray:
    """`[updates, batch]`: the library's order of the examples, epoch after epoch, in full batches."""
    epochs = -(-updates * batch // examples)
    flat = np.concatenate([epoch_order(seed, epoch, examples) for epoch in range(1, epochs + 1)])
    return flat[: updates * batch].reshape(updates, batch)


def loop_forms(config: NewLLMConfig) -> list[Form]:
    """The forms of the time loop that this device can run; the first is the one that the library trains with."""
    model = ContextVectorLM.from_config(config, 1, training_precision(config))
    return time_loop_forms(config, model)


def with_form(model: ContextVectorLM, form: Form) -> ContextVectorLM:
    """The same model, its time loop in another form."""
    return model.clone(form=form)


def training(
    config: NewLLMConfig, vocabulary: int, sequences: np.ndarray, updates: int, seed: int = 0, form: Form | None = None
) -> JaxTraining:
    """The training of a configuration from its own initial weights.

    Args:
      sequences: `[examples, T]` word ids.
      updates: number of updates that there must be batches for.
      seed: random seed of dropout alone.
      form: form of the time loop, of `loop_forms`; None for the library's choice.
    """
    model = training_model(config, vocabulary, training_precision(config))
    model = model if form is None else with_form(model, form)
    compiled, optimizer = build_training(config, model, steps_per_epoch(config, len(sequences)))
    state = initial_state(config, model, optimizer)
    order = orders(config.seed, len(sequences), config.batch_size, updates)
    return JaxTraining(compiled.updates, state, sequences, order, seed)


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


def words(config: NewLLMConfig) -> int:
    """The size of a configuration's vocabulary; of one without a bound, all words of WikiText-2."""
    return config.vocabulary_size or 33_278


def random_ids(config: NewLLMConfig, vocabulary: int) -> np.ndarray:
    """Two batches of ids `[2 B, T]`, drawn at random, none of them padding."""
    shape = (config.batch_size * 2, config.sequence_length)
    return np.random.default_rng(0).integers(1, vocabulary, shape).astype(np.uint16)


def measure_forms(task: dict[str, Any]) -> dict[str, Any]:
    """A row for each form of the time loop: the same updates on random ids, the forms taking turns."""
    config = NewLLMConfig.from_dict(task["config"])
    vocabulary, updates, repeats = words(config), task["updates"], task["repeats"]
    sequences, needed, forms = random_ids(config, vocabulary), updates_needed(updates, repeats), loop_forms(config)
    trainings = [training(config, vocabulary, sequences, needed, form=form) for form in forms]
    measured = time_in_turns(trainings, updates, repeats)
    common = {"texts": config.batch_size, "precision": training_precision(config)}
    rows = [
        {"form": form, **common, **row, "planned_memory_bytes": trained.planned_bytes}
        for form, row, trained in zip(forms, measured, trainings, strict=True)
    ]
    return {"rows": rows}


def measure_sizes(task: dict[str, Any]) -> dict[str, Any]:
    """The same training at several sizes: `config` overridden by each of `sizes`, one row each.

    Without `sequences` the ids are drawn at random, none of them padding.
    """
    rows = []
    for size in task["sizes"]:
        config = NewLLMConfig.from_dict(task["config"]).override(size)
        vocabulary = task["vocabulary"]
        sequences = np.load(task["sequences"]) if task["sequences"] else random_ids(config, vocabulary)
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
