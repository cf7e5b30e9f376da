"""The time loop of New-LLM as `lax.scan`s that any device can run: a text a row."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import Backward, CellParams, Forward, next_context, step
from newllm_jax.newllm.recurrence.gradients import of_layers, of_norm, through


def forward(
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    seeds: jax.Array | None,
    dropout: float,
    precision: jax.lax.PrecisionLike,
) -> Forward:
    """All steps forward; arguments as of `recurrence.scan_plain`."""

    def body(context: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        after, states, gates = step(params, dropout, precision, context, *inputs, seeds)
        return after, (context, tuple(states), gates)

    last, (contexts, states, gates) = jax.lax.scan(body, context, (tokens, jnp.arange(len(tokens))))
    return Forward(contexts, states[:-1], gates, last, states[-1])


def backward(
    params: CellParams,
    kept: Forward,
    d_last: jax.Array,
    d_outputs: jax.Array,
    scale: float,
    precision: jax.lax.PrecisionLike,
) -> Backward:
    """All steps backward.

    Args:
      d_last, d_outputs: gradients of what `forward` gave.
      scale: of the activations that dropout kept.
    """
    dot = partial(jnp.dot, precision=precision)

    def body(d_context: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        context, states, gates, d_output = inputs
        _, pullback = jax.vjp(lambda c, g: next_context(c, g, params.norm), context, gates)
        d_before, d_gates = pullback(d_context)
        d_pre = [through(states[-1], dot(d_gates, params.gates[0].T) + d_output, scale)]
        for (kernel, _), activated in zip(params.hidden[::-1], states[-2::-1], strict=True):
            d_pre.append(through(activated, dot(d_pre[-1], kernel.T), scale))
        return d_before + dot(d_pre[-1], params.context_in.T), (tuple(d_pre[::-1]), d_gates, d_context)

    inputs = kept.contexts, (*kept.states, kept.outputs), kept.gates, d_outputs
    d_first, (d_pre, d_gates, d_contexts) = jax.lax.scan(body, d_last, inputs, reverse=True)
    return Backward(
        d_context=d_first,
        d_first=d_pre[0],
        d_gates=d_gates,
        hidden=of_layers(kept.states, d_pre[1:], precision),
        norm=of_norm(params.norm, kept, d_contexts),
    )
