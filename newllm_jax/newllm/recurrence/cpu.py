"""The time loop of New-LLM for CPUs: a text is a column, and the two halves of the batch are independent chains.

A product of few texts is too small for two cores to share: they would wait for each other longer than they compute. Two
chains of products need not wait. Where even those are too short to gain from two cores, all texts are one chain: it
compiles faster. And XLA multiplies a few columns faster than a few rows. Results and stored activations have the layout
of the other forms.

`states` are what layers and gates read, h_1 ... h_L; `activations` are what ReLU and dropout gave. In a residual cell
those add up to the states.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec, next_context, rms_norm
from newllm_jax.newllm.recurrence.gradients import (
    Gradients,
    dense_gradient,
    kernel_gradient,
    relu_backward,
)
from newllm_jax.training.precision import dot

SMALLEST_SPLIT = 4096  # activations of a layer that are worth two chains, measured on two cores


class Activations(NamedTuple):
    """What the forward pass stores for the backward pass.

    Attributes:
      contexts: `[T, B, C]`, before each step.
      hidden: what ReLU and dropout gave in each hidden layer, L arrays `[T, B, H]`.
      gates: pre-activations, `[T, B, 3 * C]`.
    """

    contexts: jax.Array
    hidden: tuple[jax.Array, ...]
    gates: jax.Array

    def states(self, spec: CellSpec) -> list[jax.Array]:
        """h_1 ... h_L, which the next layer or the gates read, `[T, B, H]` each."""
        return list(accumulate(self.hidden) if spec.cell == "residual" else self.hidden)


def supports(spec: CellSpec, _batch: int, _steps: int) -> bool:
    """Whether this form computes the cell: every cell that exists so far."""
    return spec.precision in ("fp32", "tf32", "bf16", "fp16")


def forward(
    spec: CellSpec, params: CellParams, context: jax.Array, tokens: jax.Array, dropout: CellDropout
) -> tuple[tuple[jax.Array, jax.Array], Activations]:
    """The results of `reference.scan_plain`, and what the backward pass needs."""
    context_in = params.context_in.T  # transposed once, not at every step
    *hidden, gates_in = [(kernel.T, bias[:, None]) for kernel, bias in (*params.hidden, params.gates)]
    texts = len(context)
    divided = partial(_divided, _chains(spec, texts))
    layer_size = jnp.uint32((spec.mask_texts or texts) * spec.hidden_dim)
    ordinals = jnp.arange(texts * spec.hidden_dim, dtype=jnp.uint32).reshape(texts, spec.hidden_dim)
    text_masks = [
        [dropout.text.keeps(part + layer * layer_size) for layer in range(spec.num_layers)] if dropout.text else []
        for part in divided(ordinals)
    ]

    def step(context: jax.Array, token: jax.Array, places: jax.Array, text_masks: list[jax.Array]) -> Any:
        """One time step of one chain: `cell.step` on columns. `places` are those of the first layer's activations."""

        def activate(x: jax.Array, layer: int) -> jax.Array:
            masks = [dropout.step.keeps(places + layer * layer_size)] if dropout.step else []
            return dropout.drop(jax.nn.relu(x), [*masks, *text_masks[layer : layer + 1]])

        activations = [activate(token + dot(context_in, context, spec.precision), 0)]
        state = activations[0]
        for layer, (kernel, bias) in enumerate(hidden, 1):
            x = rms_norm(state, 0) if spec.cell == "residual" else state
            activations.append(activate(dot(kernel, x, spec.precision) + bias, layer))
            state = state + activations[-1] if spec.cell == "residual" else activations[-1]
        kernel, bias = gates_in
        gates = dot(kernel, state, spec.precision) + bias
        return next_context(context, gates, _columns(params.norm), axis=0), (context, tuple(activations), gates)

    def body(contexts: list[jax.Array], inputs: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], Any]:
        token, time = inputs
        places = time.astype(jnp.uint32) * spec.num_layers * layer_size + ordinals
        chains = zip(contexts, divided(token), divided(places), text_masks, strict=True)
        afters, stored = zip(*(step(*chain) for chain in chains), strict=True)
        return list(afters), jax.tree.map(_joined, *stored)

    last, stored = jax.lax.scan(body, divided(context), (tokens, jnp.arange(len(tokens))))
    activations = Activations(*stored)
    return (_joined(*last), activations.states(spec)[-1]), activations


def backward(
    spec: CellSpec,
    params: CellParams,
    stored: Activations,
    dropout: CellDropout,
    d_last: jax.Array,
    d_outputs: jax.Array,
) -> Gradients:
    """The gradients of all inputs; arguments of `reference.backward`."""
    residual, divided = spec.cell == "residual", partial(_divided, _chains(spec, len(d_last)))

    def step(
        d_context: jax.Array, context: jax.Array, hidden: tuple[jax.Array, ...], gates: jax.Array, d_output: jax.Array
    ) -> Any:
        """One time step of one chain backward: the gradients of the context before it and of all pre-activations."""
        _, pullback = jax.vjp(lambda c, g: next_context(c, g, _columns(params.norm), axis=0), context, gates)
        d_before, d_gates = pullback(d_context)
        d_state = dot(params.gates[0], d_gates, spec.precision) + d_output
        states = list(accumulate(hidden)) if residual else hidden
        d_pre = [relu_backward(hidden[-1], d_state, dropout.scale)]
        for (kernel, _), state, below in zip(params.hidden[::-1], states[-2::-1], hidden[-2::-1], strict=True):
            d_x = dot(kernel, d_pre[-1], spec.precision)
            d_state = d_state + jax.vjp(partial(rms_norm, axis=0), state)[1](d_x)[0] if residual else d_x
            d_pre.append(relu_backward(below, d_state, dropout.scale))
        d_before = d_before + dot(params.context_in, d_pre[-1], spec.precision)
        return d_before, (tuple(d_pre[::-1]), d_gates, d_context)

    def body(d_contexts: list[jax.Array], inputs: Any) -> tuple[list[jax.Array], Any]:
        leaves, structure = jax.tree.flatten(inputs)
        chains = [structure.unflatten(chain) for chain in zip(*map(divided, leaves), strict=True)]
        befores, found = zip(*(step(d, *chain) for d, chain in zip(d_contexts, chains, strict=True)), strict=True)
        return list(befores), jax.tree.map(_joined, *found)

    d_first, (d_pre, d_gates, d_contexts) = jax.lax.scan(body, divided(d_last), (*stored, d_outputs), reverse=True)
    *states, outputs = stored.states(spec)
    inputs = map(rms_norm, states) if residual else states
    return Gradients(
        params=CellParams(
            context_in=kernel_gradient(stored.contexts, d_pre[0], spec.precision),
            hidden=tuple(dense_gradient(x, d, spec.precision) for x, d in zip(inputs, d_pre[1:], strict=True)),
            gates=dense_gradient(outputs, d_gates, spec.precision),
            norm=jax.vjp(partial(next_context, stored.contexts, stored.gates), params.norm)[1](d_contexts)[0],
        ),
        context=_joined(*d_first),
        tokens=d_pre[0],
    )


def _chains(spec: CellSpec, texts: int) -> int:
    """Into how many chains a batch is divided."""
    return 2 if texts > 1 and texts * spec.hidden_dim >= SMALLEST_SPLIT else 1


def _divided(chains: int, texts: jax.Array) -> list[jax.Array]:
    """Texts `[B, width]` as columns, `[width, B / 2]` twice; of an odd number the second half is the larger."""
    return [part.T for part in jnp.split(texts, [len(texts) // 2])] if chains == 2 else [texts.T]


def _joined(*parts: jax.Array) -> jax.Array:
    """The inverse of `_divided`."""
    return jnp.concatenate([part.T for part in parts])


def _columns(norm: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    scale, bias = norm
    return scale[:, None], bias[:, None]
