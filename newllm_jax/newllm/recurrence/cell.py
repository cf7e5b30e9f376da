"""One time step of New-LLM: its weights, its equations, its dropout."""

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


class Forward(NamedTuple):
    """What all steps of a piece of text leave for the backward pass, and their results.

    Attributes:
      contexts: `[time, batch, context]` before each step.
      states: per layer but the last `[time, batch, hidden]`, its activations.
      gates: `[time, batch, 3 * context]`, pre-activations.
      last: `[batch, context]` after the last step.
      outputs: `[time, batch, hidden]`, the last layer's activations, in the type in which `states` are kept.
    """

    contexts: jax.Array
    states: Any
    gates: jax.Array
    last: jax.Array
    outputs: jax.Array


class Backward(NamedTuple):
    """What the chain back through time gives: gradients.

    Attributes:
      d_context: `[batch, context]`, of the context before the first step.
      d_first: `[time, batch, hidden]`, of the first layer's pre-activation.
      d_gates: `[time, batch, 3 * context]`, of the gates' pre-activations.
      hidden: of kernel and bias of each further layer.
      norm: of scale and bias of the LayerNorm.
    """

    d_context: jax.Array
    d_first: jax.Array
    d_gates: jax.Array
    hidden: tuple[tuple[jax.Array, jax.Array], ...]
    norm: tuple[jax.Array, jax.Array]


def dropout_seeds(key: jax.Array) -> jax.Array:
    """What `keep` draws the masks of one piece of text from: uint32 `[2]`."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep(seeds: Any, rate: float, numbers: jax.Array) -> jax.Array:
    """Which activations stay: bool like `numbers`, each True with probability `1 - rate`, independently.

    A hash of an activation's number, computed where it is used: a mask is never stored, and any part of it can be had
    by itself. The hash is two rounds of a 32-bit mixer in which every input bit flips each output bit half the time.

    Args:
      seeds: `dropout_seeds`, or its two elements.
      numbers: uint32, different for every activation of the piece of text.
    """

    def mix(x: jax.Array) -> jax.Array:
        x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
        return x ^ (x >> jnp.uint32(16))

    return mix(mix(numbers + seeds[0]) ^ seeds[1]) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def next_context(context: jax.Array, gates: jax.Array, norm: tuple[jax.Array, jax.Array], axis: int = -1) -> jax.Array:
    """clip(LayerNorm(f * c + i * d), -10, 10) from the gates' pre-activations, `3 * context` along `axis`."""
    forget, update, delta = jnp.split(gates, 3, axis=axis)
    mixed = jax.nn.sigmoid(forget) * context + jax.nn.sigmoid(update) * delta
    centred = mixed - jnp.mean(mixed, axis, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis, keepdims=True)
    scale, bias = norm
    normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * scale + bias
    return jnp.clip(normed, -CONTEXT_BOUND, CONTEXT_BOUND)


def step(
    params: CellParams,
    dropout: float,
    precision: jax.lax.PrecisionLike,
    context: jax.Array,
    token: jax.Array,
    time: jax.Array,
    seeds: jax.Array | None,
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """One time step.

    Args:
      dropout: the rate; what stays is scaled by `1 / (1 - dropout)`.
      precision: of the matrix products.
      context: `[batch, context]`.
      token: `[batch, hidden]`, the embedding's part of the first layer, its bias included.
      time: the step's number, a scalar.
      seeds: `dropout_seeds`; None without dropout.

    Returns:
      The next context vector, the hidden states of all layers, and the gates' pre-activations.
    """
    dot, layers = partial(jnp.dot, precision=precision), len(params.hidden) + 1

    def activate(x: jax.Array, layer: int) -> jax.Array:
        x = jax.nn.relu(x)
        if seeds is None:
            return x
        first = (time * layers + layer) * x.size
        numbers = first.astype(jnp.uint32) + jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        return jnp.where(keep(seeds, dropout, numbers), x / (1 - dropout), 0)

    states = [activate(token + dot(context, params.context_in), 0)]
    for kernel, bias in params.hidden:
        states.append(activate(dot(states[-1], kernel) + bias, len(states)))
    kernel, bias = params.gates
    gates = dot(states[-1], kernel) + bias
    return next_context(context, gates, params.norm), states, gates
