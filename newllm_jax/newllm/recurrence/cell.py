"""One time step of New-LLM: its weights, its equations, its dropout.

    h_1  = dropout(ReLU(W_c c + token))                       token = W_e e_t + b_1, computed outside the time loop
    h_l  = dropout(ReLU(W_l h_(l-1) + b_l))                   l = 2 ... L
    f, i = sigmoid(W_f h_L + b_f), sigmoid(W_i h_L + b_i);    d = W_d h_L + b_d
    c'   = clip(LayerNorm(f * c + i * d), -10, 10)

from the report of New-LLM; LayerNorm: Ba et al. 2016. The three products of the last hidden layer are one product with
the kernels of the forget gate, the input gate and the candidate side by side. In a residual cell

    h_l  = h_(l-1) + dropout(ReLU(W_l RMSNorm(h_(l-1)) + b_l))

RMSNorm (Zhang & Sennrich 2019) has no scale of its own here: W_l would absorb it.

A new option is a field of `CellSpec` with an attribute of `ContextVectorLM` of the same name, an edit of `step`, and
what `cpu.supports`, `gpu.obstacle` and `cluster.obstacle` say of it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from newllm_jax.config import Cell, Precision
from newllm_jax.newllm.dropout import Dropout
from newllm_jax.training.precision import dot, operand_type

CONTEXT_BOUND = 10.0
NORM_EPSILON = 1e-5

Form = Literal["plain", "cpu", "gpu", "cluster"]


@dataclass(frozen=True)
class CellSpec:
    """What the cell is and how it is computed: the one static argument of the time loop.

    Attributes:
      hidden_dim, context_dim, num_layers: the sizes H, C and L.
      cell: whether the hidden layers replace their input, or add to it.
      precision: of the matrix products; state and statistics are float32.
      form: which time loop computes it. All forms give the same numbers but for rounding; see `scan.forms_for`.
      mask_texts: how many texts the dropout masks are drawn for, where those at hand are a part of them; None: those at
        hand.
    """

    hidden_dim: int
    context_dim: int
    num_layers: int
    cell: Cell = "plain"
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

    def rounded(self, precision: Precision) -> CellParams:
        """With the kernels as the products read them: rounded once, where each step would round them again."""
        kind = operand_type(precision)
        return self._replace(
            context_in=self.context_in.astype(kind),
            hidden=tuple((kernel.astype(kind), bias) for kernel, bias in self.hidden),
            gates=(self.gates[0].astype(kind), self.gates[1]),
        )


class CellDropout(NamedTuple):
    """Dropout after every ReLU.

    Attributes:
      step: with a mask of its own at every step; None without.
      text: with one mask for all steps of a text (variational dropout: Gal & Ghahramani 2016); None without.
    """

    step: Dropout | None = None
    text: Dropout | None = None

    @property
    def scale(self) -> Any:
        """By which what is kept is multiplied, and its gradient."""
        return math.prod(each.rate.scale for each in self if each)

    def drop(self, activations: jax.Array, masks: Sequence[jax.Array]) -> jax.Array:
        """What is left of activations, the masks of both kinds being True where one is kept."""
        if not masks:
            return activations
        kept = math.prod(each.rate.kept for each in self if each)
        return jnp.where(reduce(operator.and_, masks), activations / kept, 0)


# (number of the layer from 0, its input [B, in], kernel [in, out], bias) -> its result [B, out]: a hidden layer's
# activations, or, for layer number L (the gates), the pre-activations
Layer: TypeAlias = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def step(
    spec: CellSpec,
    params: CellParams,
    context: jax.Array,
    token: jax.Array,
    time: jax.Array,
    dropout: CellDropout,
    layer: Layer | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One time step: the definition that every form of the time loop is tested against.

    Args:
      context: `[B, C]`.
      token: `[B, H]`, the embedding's part of the first layer, its bias included.
      time: the number of the step, a scalar.
      layer: None for `compute_layer`. The plain form of the time loop records the layers and replays them.

    Returns:
      The next context vector `[B, C]`, and the last hidden layer's activations `[B, H]`.
    """
    layer = layer or partial(compute_layer, spec, time, dropout)
    hidden = layer(0, context, params.context_in, token)
    for number, (kernel, bias) in enumerate(params.hidden, 1):
        if spec.cell == "residual":
            hidden = hidden + layer(number, rms_norm(hidden), kernel, bias)
        else:
            hidden = layer(number, hidden, kernel, bias)
    gates = layer(spec.num_layers, hidden, *params.gates)
    return next_context(context, gates, params.norm), hidden


def compute_layer(
    spec: CellSpec,
    time: jax.Array,
    dropout: CellDropout,
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
    size = activations.size if spec.mask_texts is None else spec.mask_texts * spec.hidden_dim
    ordinals = jnp.arange(activations.size, dtype=jnp.uint32).reshape(activations.shape)
    masks = []
    if dropout.step:
        first = (time * spec.num_layers + number) * size
        masks.append(dropout.step.keeps(first.astype(jnp.uint32) + ordinals))
    if dropout.text:
        masks.append(dropout.text.keeps(jnp.uint32(number) * jnp.uint32(size) + ordinals))
    return dropout.drop(activations, masks)


def rms_norm(x: jax.Array, axis: int = -1) -> jax.Array:
    """x / sqrt(mean(x^2)) along an axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis, keepdims=True) + NORM_EPSILON)


def next_context(context: jax.Array, gates: jax.Array, norm: tuple[jax.Array, jax.Array], axis: int = -1) -> jax.Array:
    """clip(LayerNorm(f * c + i * d), -10, 10) from the gates' pre-activations, of size `3 * C` along `axis`."""
    forget, update, delta = jnp.split(gates, 3, axis=axis)
    mixed = jax.nn.sigmoid(forget) * context + jax.nn.sigmoid(update) * delta
    centred = mixed - jnp.mean(mixed, axis, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis, keepdims=True)
    scale, bias = norm
    normed = centred * jax.lax.rsqrt(variance + NORM_EPSILON) * scale + bias
    return jnp.clip(normed, -CONTEXT_BOUND, CONTEXT_BOUND)
