"""The time loop of New-LLM for CPUs: a text is a column, and the two halves of the batch are independent chains.

A product of few texts is too small for two cores to share: they would wait for each other longer than they compute. Two
chains of products need not wait. And XLA multiplies a few columns faster than a few rows. Results and stored
activations have the layout of the other forms.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import CellParams, CellSpec, dropout_mask, next_context
from newllm_jax.newllm.recurrence.gradients import (
    Activations,
    Gradients,
    dense_gradient,
    kernel_gradient,
    norm_gradient,
    relu_backward,
)
from newllm_jax.training.precision import dot


def supports(spec: CellSpec) -> bool:
    """Whether this form computes the cell: every cell that exists so far."""
    return spec.precision in ("fp32", "tf32", "bf16", "fp16")


def forward(
    spec: CellSpec, params: CellParams, context: jax.Array, tokens: jax.Array, seeds: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array], Activations]:
    """The results of `reference.scan_plain`, and what the backward pass needs."""
    context_in = params.context_in.T  # transposed once, not at every step
    *hidden, gates_in = [(kernel.T, bias[:, None]) for kernel, bias in (*params.hidden, params.gates)]

    def activate(x: jax.Array, numbers: jax.Array) -> jax.Array:
        x = jax.nn.relu(x)
        if seeds is None:
            return x
        return jnp.where(dropout_mask(seeds, spec.dropout, numbers), x / (1 - spec.dropout), 0)

    def step(context: jax.Array, token: jax.Array, numbers: jax.Array, layer_size: jax.Array) -> Any:
        """One time step of one half: `cell.step` on columns. `numbers` are those of the first layer's activations."""
        states = [activate(token + dot(context_in, context, spec.precision), numbers)]
        for layer, (kernel, bias) in enumerate(hidden, 1):
            states.append(activate(dot(kernel, states[-1], spec.precision) + bias, numbers + layer * layer_size))
        kernel, bias = gates_in
        gates = dot(kernel, states[-1], spec.precision) + bias
        return next_context(context, gates, _columns(params.norm), axis=0), (context, tuple(states), gates)

    def body(contexts: list[jax.Array], inputs: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], Any]:
        token, time = inputs
        size = jnp.uint32(token.size if spec.mask_texts is None else spec.mask_texts * spec.hidden_dim)
        ordinals = jnp.arange(token.size, dtype=jnp.uint32).reshape(token.shape)
        numbers = time.astype(jnp.uint32) * spec.num_layers * size + ordinals
        halves = zip(contexts, _halves(token), _halves(numbers), strict=True)
        afters, stored = zip(*(step(*half, size) for half in halves), strict=True)
        return list(afters), jax.tree.map(_joined, *stored)

    last, (contexts, states, gates) = jax.lax.scan(body, _halves(context), (tokens, jnp.arange(len(tokens))))
    return (_joined(*last), states[-1]), Activations(contexts, states[:-1], states[-1], gates)


def backward(
    spec: CellSpec,
    params: CellParams,
    stored: Activations,
    seeds: jax.Array | None,
    d_last: jax.Array,
    d_outputs: jax.Array,
) -> Gradients:
    """The gradients of all inputs; arguments of `reference.backward`."""
    scale = 1.0 if seeds is None else 1 / (1 - spec.dropout)

    def step(d_context: jax.Array, context: jax.Array, states: Any, gates: jax.Array, d_output: jax.Array) -> Any:
        """One time step of one half backward: the gradients of the context before it and of all pre-activations."""
        _, pullback = jax.vjp(lambda c, g: next_context(c, g, _columns(params.norm), axis=0), context, gates)
        d_before, d_gates = pullback(d_context)
        d_state = dot(params.gates[0], d_gates, spec.precision) + d_output
        d_pre = [relu_backward(states[-1], d_state, scale)]
        for (kernel, _), activations in zip(params.hidden[::-1], states[-2::-1], strict=True):
            d_pre.append(relu_backward(activations, dot(kernel, d_pre[-1], spec.precision), scale))
        d_before = d_before + dot(params.context_in, d_pre[-1], spec.precision)
        return d_before, (tuple(d_pre[::-1]), d_gates, d_context)

    def body(d_contexts: list[jax.Array], inputs: Any) -> tuple[list[jax.Array], Any]:
        leaves, structure = jax.tree.flatten(inputs)
        halves = [structure.unflatten(half) for half in zip(*map(_halves, leaves), strict=True)]
        befores, found = zip(*(step(d, *half) for d, half in zip(d_contexts, halves, strict=True)), strict=True)
        return list(befores), jax.tree.map(_joined, *found)

    inputs = stored.contexts, (*stored.hidden, stored.outputs), stored.gates, d_outputs
    d_first, (d_pre, d_gates, d_contexts) = jax.lax.scan(body, _halves(d_last), inputs, reverse=True)
    return Gradients(
        params=CellParams(
            context_in=kernel_gradient(stored.contexts, d_pre[0], spec.precision),
            hidden=tuple(dense_gradient(x, d, spec.precision) for x, d in zip(stored.hidden, d_pre[1:], strict=True)),
            gates=dense_gradient(stored.outputs, d_gates, spec.precision),
            norm=norm_gradient(params.norm, stored, d_contexts),
        ),
        context=_joined(*d_first),
        tokens=d_pre[0],
    )


def _halves(texts: jax.Array) -> list[jax.Array]:
    """Texts `[B, width]` as columns, `[width, B / 2]` twice; of an odd number the second half is the larger."""
    return [half.T for half in jnp.split(texts, [len(texts) // 2])] if len(texts) > 1 else [texts.T]


def _joined(*halves: jax.Array) -> jax.Array:
    """The inverse of `_halves`."""
    return jnp.concatenate([half.T for half in halves])


def _columns(norm: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    scale, bias = norm
    return scale[:, None], bias[:, None]
