"""The compiled updates of a stage and its loss."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from newllm_jax.cascade.stage.model import Stage
from newllm_jax.config import CascadeConfig
from newllm_jax.training.step import LossFn, Params, Sums, UpdateFn, make_updates, train_step


def next_token_loss(stage: Stage) -> LossFn:
    """The loss of a stage as the update loop wants it; its batch is `(hidden [batch, hidden], targets [batch])`."""

    def loss(params: Params, batch: Any, present: jax.Array, key: jax.Array | None) -> Sums:
        hidden, targets = batch
        _, logits = cast(tuple[jax.Array, jax.Array], stage.apply({"params": params}, hidden))
        return sums_of(logits, targets, present)

    return loss


def stage_updates(
    stage: Stage, config: CascadeConfig, optimizer: optax.GradientTransformation, precision: str
) -> UpdateFn:
    """The compiled updates of a stage in a resolved precision: on GPUs that can, through kernels of their own."""
    if not fusible(stage, config.batch_size, precision):
        return make_updates(partial(train_step, next_token_loss(stage), optimizer))
    from newllm_jax.cascade.stage.fused_step import stage_step

    return make_updates(partial(stage_step, stage, config, optimizer))


def fusible(stage: Stage, batch_size: int, precision: str) -> bool:
    """Whether a stage's updates in this resolved precision can go through the kernels of `fused_step.py`.

    They need what tf32 needs, an NVIDIA GPU of compute capability 8.0; widths that cut into tiles of 64; a batch that
    a thread block can hold, and a power of two; and a JAX that has Pallas's Triton backend.
    """
    config = stage.config
    heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widths = config.vocab_size, config.hidden_size, config.intermediate_size, *heads
    return (
        precision == "tf32" and not any(width % 64 for width in widths) and batch_size in (16, 32, 64)
        and importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    )  # fmt: skip


def sums_of(logits: jax.Array, targets: jax.Array, present: jax.Array) -> Sums:
    """Cross-entropy (nats) and hits of `logits [batch, vocab]`, over the targets that are present."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, -1) == targets) & present
    return Sums(loss=jnp.sum(losses, where=present), hits=jnp.sum(hits), count=jnp.sum(present))
