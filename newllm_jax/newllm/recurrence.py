"""The recurrence of New-LLM over a piece of text: the context vector carried through the layers, step by step.

`scan_plain` is the definition, differentiated by JAX. `scan` computes the same and has a backward pass of its own,
which leaves in the time loop only what depends on the step after it: the gradient of every weight is one large
product over all steps at the end, instead of a small one added up at every step.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CONTEXT_BOUND = 10.0
LAYER_NORM_EPSILON = 1e-5


class CellParams(NamedTuple):
    """The weights that work inside the time loop.

    Attributes:
      context_in: `[context, hidden]`, the context vector's part of the first layer.
      hidden: per further layer, kernel `[hidden, hidden]` and bias `[hidden]`.
      gates: kernel `[hidden, 3 * context]` and bias of forget gate, input gate and candidate, side by side.
      norm: scale and bias `[context]` of the LayerNorm.
    """

    context_in: jax.Array
    hidden: tuple[tuple[jax.Array, jax.Array], ...]
    gates: tuple[jax.Array, jax.Array]
    norm: tuple[jax.Array, jax.Array]


def dropout_keep(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Which activations stay: bool `shape`, each True with probability `1 - rate` (to 1 in 65,536)."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*shape[:-1], -1)[..., : shape[-1]]
    return halves >= round(rate * 2**16)


def next_context(context: jax.Array, gates: jax.Array, norm: tuple[jax.Array, jax.Array]) -> jax.Array:
    """clip(LayerNorm(f * c + i * d), -10, 10) from the gates' pre-activations `[batch, 3 * context]`."""
    forget, update, delta = jnp.split(gates, 3, axis=-1)
    mixed = jax.nn.sigmoid(forget) * context + jax.nn.sigmoid(update) * delta
    centred = mixed - jnp.mean(mixed, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
    scale, bias = norm
    normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * scale + bias
    return jnp.clip(normed, -CONTEXT_BOUND, CONTEXT_BOUND)


def step(
    params: CellParams, dropout: float, dot: Any, context: jax.Array, token: jax.Array, keep: jax.Array | None
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """One time step.

    Args:
      dropout: the rate that `keep` was drawn with; what stays is scaled by `1 / (1 - dropout)`.
      dot: the matrix product, in the precision of the model.
      context: `[batch, context]`.
      token: `[batch, hidden]`, the embedding's part of the first layer, its bias included.
      keep: bool `[layers, batch, hidden]`; None without dropout.

    Returns:
      The next context vector, the hidden states of all layers, and the gates' pre-activations.
    """

    def activate(x: jax.Array, layer: int) -> jax.Array:
        return jax.nn.relu(x) if keep is None else jnp.where(keep[layer], jax.nn.relu(x) / (1 - dropout), 0)

    states = [activate(token + dot(context, params.context_in), 0)]
    for kernel, bias in params.hidden:
        states.append(activate(dot(states[-1], kernel) + bias, len(states)))
    kernel, bias = params.gates
    gates = dot(states[-1], kernel) + bias
    return next_context(context, gates, params.norm), states, gates


def scan_plain(
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    keep: jax.Array | None,
    dropout: float,
    precision: jax.lax.PrecisionLike,
) -> tuple[jax.Array, jax.Array]:
    """All steps, in the plainest form.

    Args:
      context: `[batch, context]` before the first token.
      tokens: `[time, batch, hidden]`.
      keep: bool `[time, layers, batch, hidden]`; None without dropout.

    Returns:
      The last context vector, and the last layer's hidden states `[time, batch, hidden]`.
    """
    dot = partial(jnp.dot, precision=precision)

    def body(context: jax.Array, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        context, states, _ = step(params, dropout, dot, context, *inputs)
        return context, states[-1]

    return jax.lax.scan(body, context, (tokens, keep))


scan = jax.custom_vjp(scan_plain, nondiff_argnums=(4, 5))
"""`scan_plain` with the backward pass described above."""


def _forward(
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    keep: jax.Array | None,
    dropout: float,
    precision: jax.lax.PrecisionLike,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Keeps of every step what the backward pass reads: context before it, gates, hidden states."""
    dot = partial(jnp.dot, precision=precision)

    def body(context: jax.Array, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, Any]:
        after, states, gates = step(params, dropout, dot, context, *inputs)
        return after, (context, tuple(states), gates)

    last, (contexts, states, gates) = jax.lax.scan(body, context, (tokens, keep))
    return (last, states[-1]), (params, contexts, states, gates, keep is not None)


def _backward(
    dropout: float, precision: jax.lax.PrecisionLike, saved: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[CellParams, jax.Array, jax.Array, None]:
    """The chain through time gives the gradient of every pre-activation; products over all steps give the weights'."""
    params, contexts, states, gates, dropped = saved
    d_last, d_outputs = cotangents
    dot = partial(jnp.dot, precision=precision)
    scale = 1 / (1 - dropout) if dropped else 1.0

    def through(activated: jax.Array, gradient: jax.Array) -> jax.Array:
        # An activation is positive exactly where ReLU passed it and dropout kept it.
        return jnp.where(activated > 0, gradient * scale, 0)

    def body(d_context: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        context, states, gates, d_output = inputs
        _, pullback = jax.vjp(lambda c, g: next_context(c, g, params.norm), context, gates)
        d_before, d_gates = pullback(d_context)
        d_pre = [through(states[-1], dot(d_gates, params.gates[0].T) + d_output)]
        for (kernel, _), activated in zip(params.hidden[::-1], states[-2::-1], strict=True):
            d_pre.append(through(activated, dot(d_pre[-1], kernel.T)))
        return d_before + dot(d_pre[-1], params.context_in.T), (tuple(d_pre[::-1]), d_gates, d_context)

    d_first, (d_pre, d_gates, d_contexts) = jax.lax.scan(
        body, d_last, (contexts, states, gates, d_outputs), reverse=True
    )

    def weights(inputs: jax.Array, gradients: jax.Array) -> jax.Array:
        return jnp.einsum("tbi,tbo->io", inputs, gradients, precision=precision)

    def biases(gradients: jax.Array) -> jax.Array:
        return jnp.sum(gradients, (0, 1))

    _, norm_pullback = jax.vjp(lambda norm: next_context(contexts, gates, norm), params.norm)
    gradients = CellParams(
        context_in=weights(contexts, d_pre[0]),
        hidden=tuple((weights(x, d), biases(d)) for x, d in zip(states[:-1], d_pre[1:], strict=True)),
        gates=(weights(states[-1], d_gates), biases(d_gates)),
        norm=norm_pullback(d_contexts)[0],
    )
    return gradients, d_first, d_pre[0], None


scan.defvjp(_forward, _backward)
