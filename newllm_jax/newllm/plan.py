"""What a New-LLM run would be: whether it fits the machine, and what `--dry_run` prints."""

from __future__ import annotations

from typing import Any

import jax

from newllm_jax.config import NewLLMConfig, Precision
from newllm_jax.config.newllm import LAST_UPDATE
from newllm_jax.errors import InputError
from newllm_jax.newllm.loss import logit_parts
from newllm_jax.newllm.updates import build_training, initial_state, training_mesh, training_model, training_precision
from newllm_jax.newllm.wikitext import SPLITS, Wikitext, load_wikitext
from newllm_jax.records.machine import environment, peak_memory_bytes
from newllm_jax.training.memory import (
    ADAM_BYTES,
    FLOAT,
    PLAN_FACTOR,
    USABLE_SHARE,
    check_memory,
    device_memory,
    update_bytes,
)
from newllm_jax.training.mesh import ONE_DEVICE, DeviceMesh


def plan_newllm(config: NewLLMConfig) -> dict[str, Any]:
    """The resolved configuration, counts of data, parameters and updates, and an estimate of the memory.

    The memory is XLA's own plan of the compiled update on each device, with the data; on a CPU, with what the process
    holds by then.

    Raises:
      InputError: a setting or source that cannot be used, or a run that does not fit the machine.
    """
    precision = training_precision(config)
    data = load_wikitext(config)
    check_fits(config, data, precision)
    summary = data.summary(config)
    needed = planned_memory(config, data, precision)
    mesh = training_mesh(config)
    if jax.devices()[0].platform == "cpu":  # whose devices share the memory of the machine
        needed = needed * mesh.size + peak_memory_bytes()
    return {
        "system": config.system,
        "config": config.to_dict(),
        "environment": environment(precision),
        "data": summary,
        **mesh.summary(),
        "parameters": parameter_count(config, len(data.tokenizer)),
        "updates_per_epoch": summary["steps_per_epoch"],
        "updates": summary["steps_per_epoch"] * config.num_epochs,
        "estimated_memory_bytes": needed,
    }


def check_fits(config: NewLLMConfig, data: Wikitext, precision: Precision) -> None:
    """Raises InputError where a run would not fit the memory that is free, or has more updates than can be counted."""
    steps = data.steps(config)
    for name, epochs in (
        ("num_epochs", config.num_epochs),
        ("decay_epochs", config.decay_epochs or 0),
        ("clip_epochs", max(config.clip_epochs, default=0)),
    ):
        if epochs * steps > LAST_UPDATE:
            raise InputError(f"{name}: {epochs:,} epochs of {steps:,} updates are more than {LAST_UPDATE:,} updates")
    bound = memory_bound(config, len(data.tokenizer), precision, training_mesh(config))
    bound["stride or sequence_length"] = sum(data.held(split, config).size for split in SPLITS)
    check_memory(bound, lambda: planned_memory(config, data, precision))
    check_places(config)


def members_that_fit(config: NewLLMConfig, data: Wikitext, precision: Precision, members: int) -> int:
    """How many of some trainings of this size the free memory takes side by side, one at least.

    Each is counted with its gradients, moments and activations, three times its state (after an epoch there are copies)
    and with data of its own, which in truth are shared.
    """
    _, free = device_memory()
    bound = memory_bound(config, len(data.tokenizer), precision)
    if free is None or members * PLAN_FACTOR * sum(bound.values()) <= free:
        return members
    parameters = parameter_count(config, len(data.tokenizer))
    needed = planned_memory(config, data, precision) + 2 * ADAM_BYTES * parameters
    return min(members, max(1, int(USABLE_SHARE * free) // needed))


def check_places(config: NewLLMConfig) -> None:
    """Raises InputError where dropout would give two activations of an update the same place, and so the same mask."""
    steps = config.sequence_length - 1 if config.dropout else 1
    places = steps * config.num_layers * config.batch_size * config.hidden_dim
    if (config.dropout or config.variational_dropout) and places >= 2**32:
        raise InputError(
            f"batch_size: an update has {places:,} activations, and dropout can number 2^32; lower batch_size or "
            "sequence_length, or set dropout to 0"
        )


def planned_memory(config: NewLLMConfig, data: Wikitext, precision: Precision) -> int:
    """The bytes of the device that training takes, by XLA's plan of the update, which is compiled."""
    model, steps = training_model(config, len(data.tokenizer), precision), data.steps(config)
    training, optimizer = build_training(config, model, steps)
    state = jax.eval_shape(lambda: initial_state(config, model, optimizer))
    held = {split: data.held(split, config) for split in SPLITS}
    train = held["train"]
    needed = update_bytes(training.updates, state, train.data, train.updates, config.batch_size)
    return needed - train.data_bytes + sum(each.size for each in held.values())


def memory_bound(
    config: NewLLMConfig, vocabulary_size: int, precision: Precision, mesh: DeviceMesh = ONE_DEVICE
) -> dict[str, int]:
    """The bytes of a device that an update takes at least, by the settings that they grow with.

    They follow from shapes alone; nothing is traced, which for some sizes would take hours. An update holds the
    parameters with their gradients and moments, and of every token what the backward pass reads: the activations of
    every layer, the three gates, and the logits that are computed at once.
    """
    steps, texts = config.sequence_length - 1, config.examples_at_once // mesh.size
    tokens, parts = steps * texts, logit_parts(steps, texts, vocabulary_size)
    stored = (config.num_layers + 1) * config.hidden_dim + 3 * config.context_dim
    width = 2 if precision == "bf16" else FLOAT
    return {
        "hidden_dim, context_dim, embed_dim or num_layers": ADAM_BYTES
        * parameter_count(config, vocabulary_size)
        // mesh.fsdp,
        "micro_batch, batch_size or sequence_length": tokens * (stored * width + vocabulary_size * FLOAT // parts),
    }


def parameter_count(config: NewLLMConfig, vocabulary_size: int) -> int:
    """The number of parameters of the model, from shapes alone."""
    embed, hidden, context = config.embed_dim, config.hidden_dim, config.context_dim
    token_in = vocabulary_size * embed + (embed + 1) * hidden
    cell = context * hidden + (config.num_layers - 1) * (hidden + 1) * hidden + (hidden + 1) * 3 * context + 2 * context
    head = hidden * embed if config.tie_embeddings else hidden * vocabulary_size
    return token_in + cell + head + vocabulary_size
