"""The time loop of New-LLM for CPUs: a text a column, and each half of the batch a chain of its own.

A product of few texts is too small for two cores to share, because they wait for each other longer than they compute;
two chains need not wait. And XLA multiplies a few columns faster than a few rows. What is kept lies as in `rows.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import Backward, CellParams, Forward, keep, next_context
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
    dot, layers = partial(jnp.dot, precision=precision), len(params.hidden) + 1
    context_in = params.context_in.T  # turned around here, not at every step
    *hidden, gates_in = [(kernel.T, bias[:, None]) for kernel, bias in (*params.hidden, params.gates)]

    def activate(x: jax.Array, numbers: jax.Array) -> jax.Array:
        x = jax.nn.relu(x)
        return x if seeds is None else jnp.where(keep(seeds, dropout, numbers), x / (1 - dropout), 0)

    def step(context: jax.Array, token: jax.Array, numbers: jax.Array, layer_size: jax.Array) -> Any:
        """One time step of one chain; `numbers` are those of the first layer's activations."""
        states = [activate(token + dot(context_in, context), numbers)]
        for layer, (kernel, bias) in enumerate(hidden, 1):
            states.append(activate(dot(kernel, states[-1]) + bias, numbers + layer * layer_size))
        kernel, bias = gates_in
        gates = dot(kernel, states[-1]) + bias
        return next_context(context, gates, _columns(params.norm), axis=0), (context, tuple(states), gates)

    def body(contexts: list[jax.Array], inputs: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], Any]:
        token, time = inputs
        size = jnp.uint32(token.size)
        ordinals = jnp.arange(token.size, dtype=jnp.uint32).reshape(token.shape)
        numbers = time.astype(jnp.uint32) * layers * size + ordinals
        chains = zip(contexts, _halves(token), _halves(numbers), strict=True)
        afters, kept = zip(*(step(*chain, size) for chain in chains), strict=True)
        return list(afters), jax.tree.map(_joined, *kept)

    last, (contexts, states, gates) = jax.lax.scan(body, _halves(context), (tokens, jnp.arange(len(tokens))))
    return Forward(contexts, states[:-1], gates, _joined(*last), states[-1])


def backward(
    params: CellParams,
    kept: Forward,
    d_last: jax.Array,
    d_outputs: jax.Array,
    scale: float,
    precision: jax.lax.PrecisionLike,
) -> Backward:
    """All steps backward; arguments as of `rows.backward`."""
    dot = partial(jnp.dot, precision=precision)

    def step(d_context: jax.Array, context: jax.Array, states: Any, gates: jax.Array, d_output: jax.Array) -> Any:
        _, pullback = jax.vjp(lambda c, g: next_context(c, g, _columns(params.norm), axis=0), context, gates)
        d_before, d_gates = pullback(d_context)
        d_pre = [through(states[-1], dot(params.gates[0], d_gates) + d_output, scale)]
        for (kernel, _), activated in zip(params.hidden[::-1], states[-2::-1], strict=True):
            d_pre.append(through(activated, dot(kernel, d_pre[-1]), scale))
        return d_before + dot(params.context_in, d_pre[-1]), (tuple(d_pre[::-1]), d_gates, d_context)

    def body(d_contexts: list[jax.Array], inputs: Any) -> tuple[list[jax.Array], Any]:
        leaves, structure = jax.tree.flatten(inputs)
        chains = [structure.unflatten(halves) for halves in zip(*map(_halves, leaves), strict=True)]
        befores, kept = zip(*(step(d, *chain) for d, chain in zip(d_contexts, chains, strict=True)), strict=True)
        return list(befores), jax.tree.map(_joined, *kept)

    inputs = kept.contexts, (*kept.states, kept.outputs), kept.gates, d_outputs
    d_first, (d_pre, d_gates, d_contexts) = jax.lax.scan(body, _halves(d_last), inputs, reverse=True)
    return Backward(
        d_context=_joined(*d_first),
        d_first=d_pre[0],
        d_gates=d_gates,
        hidden=of_layers(kept.states, d_pre[1:], precision),
        norm=of_norm(params.norm, kept, d_contexts),
    )


def _halves(texts: jax.Array) -> list[jax.Array]:
    """Texts `[batch, width]` as columns, `[width, batch / 2]` twice; of an odd number the second half is the larger."""
    return [half.T for half in jnp.split(texts, [len(texts) // 2])] if len(texts) > 1 else [texts.T]


def _joined(*halves: jax.Array) -> jax.Array:
    """What `_halves` took apart."""
    return jnp.concatenate([half.T for half in halves])


def _columns(norm: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    scale, bias = norm
    return scale[:, None], bias[:, None]
