"""One time step of New-LLM: its weights, its equations, its dropout.

    h_1  = dropout(ReLU(W_c c + token))                       token = W_e e_t + b_1, computed outside the time loop
    h_l  = dropout(ReLU(W_l h_(l-1) + b_l))                   l = 2 ... L
    f, i = sigmoid(W_f h_L + b_f), sigmoid(W_i h_L + b_i);    d = W_d h_L + b_d
    c'   = clip(LayerNorm(f * c + i * d), -10, 10)

from the report of New-LLM; LayerNorm: Ba et al. 2016. The three products of the last hidden layer are one product with
the kernels of the forget gate, the input gate and the candidate side by side.

A new option is a field of `CellSpec` with an attribute of `ContextVectorLM` of the same name, an edit of `step`, and
what `cpu.supports` and `gpu.obstacle` say of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from newllm_jax.config import Precision
from newllm_jax.training.precision import dot

CONTEXT_BOUND = 10.0
LAYER_NORM_EPSILON = 1e-5

Form = Literal["plain", "cpu", "gpu"]


@dataclass(frozen=True)
class CellSpec:
    """What the cell is and how it is computed: the one static argument of the time loop.

    Attributes:
      hidden_dim, context_dim, num_layers: the sizes H, C and L.
      dropout: share of the activations that is dropped after every ReLU, where a seed is given.
      precision: of the matrix products; state and statistics are float32.
      form: which time loop computes it. All forms give the same numbers but for rounding; see `scan.form_for`.
      mask_texts: how many texts the dropout masks are drawn for, where those at hand are a part of them; None: those at
        hand.
    """

    hidden_dim: int
    context_dim: int
    num_layers: int
    dropout: float = 0.0
    precision: Precision = "fp32"
    form: Form = "plain"
    mask_texts: int | None = None


class CellParams(NamedTuple):
    """The weights that are used inside the time loop.

    Attributes:
      context_in: `[C, H]`, the context vector's part of the first layer's kernel.
      hidden: per further layer its kernel `[H, H]` and bias `[H]`.
      gates: kernel `[H, 3 * C]` and bias `[3 * C]` of forget gate, input gate and candidate, side by side.
      norm: scale and bias `[C]` of the LayerNorm.
    """

    context_in: jax.Array
    hidden: tuple[tuple[jax.Array, jax.Array], ...]
    gates: tuple[jax.Array, jax.Array]
    norm: tuple[jax.Array, jax.Array]


# (number of the layer from 0, its input [B, in], kernel [in, out], bias) -> its result [B, out]: a hidden layer's
# activations, or, for layer number L (the gates), the pre-activations
Layer: TypeAlias = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def step(
    spec: CellSpec,
    params: CellParams,
    context: jax.Array,
    token: jax.Array,
    time: jax.Array,
    seeds: jax.Array | None,
    layer: Layer | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One time step: the definition that every form of the time loop is tested against.

    Args:
      context: `[B, C]`.
      token: `[B, H]`, the embedding's part of the first layer, its bias included.
      time: the number of the step, a scalar.
      seeds: `dropout_seeds`; None without dropout.
      layer: None for `compute_layer`. The plain form of the time loop records the layers and replays them.

    Returns:
      The next context vector `[B, C]`, and the last hidden layer's activations `[B, H]`.
    """
    layer = layer or partial(compute_layer, spec, time, seeds)
    hidden = layer(0, context, params.context_in, token)
    for number, (kernel, bias) in enumerate(params.hidden, 1):
        hidden = layer(number, hidden, kernel, bias)
    gates = layer(spec.num_layers, hidden, *params.gates)
    return next_context(context, gates, params.norm), hidden


def compute_layer(
    spec: CellSpec,
    time: jax.Array,
    seeds: jax.Array | None,
    number: int,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    """A layer: a product and a bias; in the hidden ones then ReLU and dropout. Arguments of `step` and of `Layer`."""
    pre_activations = dot(x, kernel, spec.precision) + bias
    if number == spec.num_layers:
        return pre_activations
    activations = jax.nn.relu(pre_activations)
    if seeds is None:
        return activations
    size = activations.size if spec.mask_texts is None else spec.mask_texts * spec.hidden_dim
    first = (time * spec.num_layers + number) * size
    numbers = first.astype(jnp.uint32) + jnp.arange(activations.size, dtype=jnp.uint32).reshape(activations.shape)
    return jnp.where(dropout_mask(seeds, spec.dropout, numbers), activations / (1 - spec.dropout), 0)


def next_context(context: jax.Array, gates: jax.Array, norm: tuple[jax.Array, jax.Array], axis: int = -1) -> jax.Array:
    """clip(LayerNorm(f * c + i * d), -10, 10) from the gates' pre-activations, of size `3 * C` along `axis`."""
    forget, update, delta = jnp.split(gates, 3, axis=axis)
    mixed = jax.nn.sigmoid(forget) * context + jax.nn.sigmoid(update) * delta
    centred = mixed - jnp.mean(mixed, axis, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis, keepdims=True)
    scale, bias = norm
    normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * scale + bias
    return jnp.clip(normed, -CONTEXT_BOUND, CONTEXT_BOUND)


def dropout_seeds(key: jax.Array, first: jax.Array | None = None) -> jax.Array:
    """What `dropout_mask` draws the masks of one piece of text from: uint32 `[2]`.

    Args:
      first: the number of the first activation of a layer, where the texts at hand are a part of a batch
        (`CellSpec.mask_texts`).
    """
    seeds = jax.random.bits(key, (2,), jnp.uint32)
    return seeds if first is None else seeds.at[0].add(first.astype(jnp.uint32))  # it is added to all numbers


def dropout_mask(seeds: Any, rate: float, numbers: jax.Array) -> jax.Array:
    """Which activations are not dropped: bool like `numbers`, each True with probability `1 - rate`, independently.

    A hash of an activation's number, computed where it is used: no mask is ever stored, and any part of one can be
    computed alone. The hash is two rounds of a 32-bit mixer in which every input bit flips each output bit with
    probability one half.

    Args:
      seeds: `dropout_seeds`, or its two elements.
      numbers: uint32, different for every activation of the piece of text.
    """

    def mix(x: jax.Array) -> jax.Array:
        x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
        return x ^ (x >> jnp.uint32(16))

    return mix(mix(numbers + seeds[0]) ^ seeds[1]) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
