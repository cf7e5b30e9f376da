"""Gradients that every form of the time loop takes alike: through an activation, and of the weights over all steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import Forward, next_context
from newllm_jax.training.precision import product


def through(activated: jax.Array, gradient: jax.Array, scale: float) -> jax.Array:
    """The gradient of what ReLU and dropout read; an activation is positive exactly where both let it pass.

    Args:
      scale: of the activations that dropout kept.
    """
    return jnp.where(activated > 0, gradient * scale, 0)


def over_steps(inputs: jax.Array, gradients: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """The gradient of a kernel from its inputs and the gradients of its products, over all steps and texts."""
    turned = partial(_turned_first, precision=precision)
    straight = partial(product, "tbi,tbo->io", precision=precision)
    return jax.lax.platform_dependent(inputs.astype(gradients.dtype), gradients, cpu=turned, default=straight)


def _turned_first(inputs: jax.Array, gradients: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """For CPUs, where a product with an operand that lies the other way around takes longer than turning it."""
    turned = jax.lax.optimization_barrier(inputs.reshape(-1, inputs.shape[-1]).T)  # else XLA undoes it
    return product("in,no->io", turned, gradients.reshape(-1, gradients.shape[-1]), precision)


def total(gradients: jax.Array) -> jax.Array:
    """The gradient of a bias from those of what it was added to, over all steps and texts."""
    return jnp.sum(gradients, (0, 1), dtype=jnp.float32)


def of_layers(states: Any, d_pre: Any, precision: jax.lax.PrecisionLike) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Of kernel and bias of every layer but the first.

    Args:
      states: per such layer what it read, `[time, batch, hidden]`.
      d_pre: per such layer the gradient of its pre-activation, likewise.
    """
    return tuple((over_steps(x, d, precision), total(d)) for x, d in zip(states, d_pre, strict=True))


def of_norm(norm: tuple[jax.Array, jax.Array], kept: Forward, d_contexts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the LayerNorm's scale and bias, from the gradients `[time, batch, context]` of the context after each step."""
    _, pullback = jax.vjp(lambda norm: next_context(kept.contexts, kept.gates, norm), norm)
    return pullback(d_contexts)[0]
