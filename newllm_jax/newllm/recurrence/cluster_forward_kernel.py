"""The kernel of the time loop forward in clusters of thread blocks: see `cluster_group.py`, which has the legend, too.

`cluster.py` calls this; `cell.py` has the equations of the model.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from newllm_jax.newllm.dropout import dropout_mask
from newllm_jax.newllm.recurrence.cell import CONTEXT_BOUND, NORM_EPSILON
from newllm_jax.newllm.recurrence.cluster_group import (
    Between,
    Cluster,
    Rows,
    Shared,
    by_rows,
    load,
    sigmoid,
    sum_over_blocks,
)
from newllm_jax.newllm.recurrence.cluster_tiling import COLUMNS, ROWS


class Inputs(NamedTuple):
    """What the kernel reads, of all members.

    Attributes:
      tokens: `[M, T, B, H]`, the embedding's part of the first layer, its bias included.
      masks: uint32 `[M, K, 3]`, of each kind of dropout its two seeds and `Rate.least`.
      scale: `[M, 1]`, `CellDropout.scale`.
      context: `[M, B, C]`.
      weights: the chunks of all layers in their order, then those of f, i and d; see `Cluster`.
      vectors: `[M, N, L + 4, 64]`: the biases of layers 1 ... L - 1, of f, i and d, the LayerNorm's scale and bias.
    """

    tokens: Any
    masks: Any
    scale: Any
    context: Any
    weights: Any
    vectors: Any


class Results(NamedTuple):
    """What the kernel writes; the backward pass reads all but `last`.

    Attributes:
      contexts: c_t, `[M, T, B, C]`.
      states: h_0 ... h_(L-2), `[M, L - 1, T, B, H]`.
      outputs: h_(L-1), `[M, T, B, H]`.
      gates: f, i and d, `[M, T, B, 3 * C]`.
      moments: of m_(t+1), the mean and 1 / standard deviation of each row: `[M, T, 2, B]`.
      last: c_T, `[M, B, C]`.
    """

    contexts: Any
    states: Any
    outputs: Any
    gates: Any
    moments: Any
    last: Any


def forward_kernel(
    inputs: Inputs, results: Results, between: Between, shared: Shared, *, texts: int, kinds: tuple[bool, bool]
) -> None:
    """All steps forward.

        c_t     = clip(LayerNorm(m_t), -10, 10)                c_0 is the input `context`
        h_0     = dropout(ReLU(c_t W_in + tokens_t))
        h_l     = dropout(ReLU(h_(l-1) W_l + b_l))             l = 1 ... L - 1
        f, i, d = h_(L-1) W_gates + b_gates                    pre-activations
        m_(t+1) = sigmoid(f) * c_t + sigmoid(i) * d

    Each c_t and each h ends with an exchange, m with one of its rows' means and deviations. A block keeps its columns
    of c_t in registers. While it waits for an exchange, it takes the next mask, which other warps of the block draw, or
    loads the next step's tokens. Layers and gates are loops, not unrolled, so that the kernel compiles sooner.

    Args:
      texts: of the batch that the dropout masks are drawn for, without padding; `cell.compute_layer` counts likewise.
      kinds: whether there are masks by step, and masks by text.
    """
    drawn = sum(kinds)

    @pl.when(lax.axis_index("warps") == 0)
    def _() -> None:
        compute_steps(inputs, results, between, shared, drawn > 0)

    if drawn:

        @pl.when(lax.axis_index("warps") == 1)
        def _() -> None:
            draw_masks(inputs, shared, texts, kinds)


def draw_masks(inputs: Inputs, shared: Shared, texts: int, kinds: tuple[bool, bool]) -> None:
    """The program of warps that do nothing else: the dropout masks of all layers of all steps, 0 or 1, in order."""
    _, steps, batch, hidden = inputs.tokens.shape
    layers, group = inputs.vectors.shape[2] - 4, Rows(batch)
    drawn = [[inputs.masks[group.member, kind, part] for part in range(3)] for kind in range(sum(kinds))]

    def layer_mask(layer: Any, t: Any) -> jax.Array:
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), axis, layout=plgpu.Layout.WGMMA) for axis in range(2)
        )
        first = group.first_row * hidden + group.rank * COLUMNS
        numbers = [number for number, kind in zip((t * layers + layer, layer), kinds, strict=True) if kind]

        def mask(number: Any, seed: Any, other: Any, least: Any) -> jax.Array:
            places = row * hidden + column + (first + number * (texts * hidden))
            return dropout_mask((seed, other), least, places.astype(jnp.uint32))

        masks = [mask(number, *kind) for number, kind in zip(numbers, drawn, strict=True)]
        return jnp.where(reduce(operator.and_, masks), 1.0, 0.0)

    count = steps * layers + 1  # the last step, too, asks for that of the next

    @pl.loop(0, count)
    def _(number: Any) -> None:
        slot = lax.rem(number, 2)

        @pl.when(number >= 2)
        def _() -> None:
            plgpu.barrier_wait(shared.masks_used.at[slot])

        shared.masks[slot] = layer_mask(lax.rem(number, layers), number // layers).astype(shared.masks.dtype)
        plgpu.barrier_arrive(shared.masks_drawn.at[slot])

    for number in (count, count + 1):  # until the last two have been used
        plgpu.barrier_wait(shared.masks_used.at[number % 2])


def compute_steps(inputs: Inputs, results: Results, between: Between, shared: Shared, dropout: bool) -> None:
    """The program of the other warps: all that `forward_kernel` says, but for the masks."""
    _, steps, batch, _ = inputs.tokens.shape
    layers = inputs.vectors.shape[2] - 4
    group = Cluster(shared, between, inputs.weights, inputs.vectors, batch, steps)
    member, rows, here = group.member, group.rows, group.here
    scale = inputs.scale[member, 0]

    def mask(number: Any) -> Any:
        """What h_layer is multiplied with, 0 or 1; () without dropout. Each is taken once, in order."""
        if not dropout:
            return ()
        slot = lax.rem(number, 2)
        plgpu.barrier_wait(shared.masks_drawn.at[slot])
        kept = load(shared.masks.at[slot])
        plgpu.barrier_arrive(shared.masks_used.at[slot])
        return kept

    def activate(x: jax.Array, kept: Any) -> jax.Array:
        x = jnp.maximum(x, 0.0)
        return jnp.where(kept > 0, x * scale, 0.0) if dropout else x

    def token(t: Any) -> jax.Array:
        return load(inputs.tokens.at[member, t, rows, here]).astype(jnp.float32)

    def step(t: Any, carry: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
        context, token_part, kept = carry
        sent, chunk = t * (layers + 1), t * group.chunks
        results.contexts[member, t, rows, here] = context

        def layer(number: Any, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            """Takes what is added to its product, and its mask; gives those of the next."""
            added, kept = carry
            x = activate(group.product(sent + number, chunk + number * group.per_product) + added, kept)

            def store(tile: Any) -> None:
                @pl.when(number < layers - 1)
                def _() -> None:
                    plgpu.copy_smem_to_gmem(tile, results.states.at[member, number, t, rows, here])

                @pl.when(number == layers - 1)
                def _() -> None:
                    plgpu.copy_smem_to_gmem(tile, results.outputs.at[member, t, rows, here])

            def following() -> tuple[jax.Array, Any]:
                return group.vector(number), mask(t * layers + number + 1)

            return group.exchange(sent + number + 1, x, store, following)

        _, kept = lax.fori_loop(0, layers, layer, (token_part, kept))

        def gate(part: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """f, i and d in turn; stores what only the backward pass reads while the next weights arrive."""
            sums, before = carry
            first = chunk + (layers + part) * group.per_product
            x = group.product(sent + layers, first) + group.vector(layers - 1 + part)
            results.gates[member, t, rows, group.columns(part)] = x
            opened = sigmoid(x)
            mixed = lax.switch(part, [lambda: opened * context, lambda: sums, lambda: sums + before * x])
            return mixed, opened

        mixed, _ = lax.fori_loop(0, 3, gate, (context, context))
        mean, inverse = moments(group, mixed)

        @pl.when(group.rank == 0)
        def _() -> None:
            for part, x in enumerate((mean, inverse)):
                results.moments[member, t, part, rows] = x

        normed = (mixed - by_rows(mean)) * by_rows(inverse) * group.vector(layers + 2) + group.vector(layers + 3)
        context = jnp.clip(normed, -CONTEXT_BOUND, CONTEXT_BOUND)
        following = jnp.minimum(t + 1, steps - 1)
        return context, group.exchange(sent + layers + 1, context, meanwhile=lambda: token(following)), kept

    context, first = load(inputs.context.at[member, rows, here]), jnp.int32(0)
    carry = context, group.exchange(first, context, meanwhile=lambda: token(first)), mask(first)
    context, _, _ = lax.fori_loop(0, steps, step, carry)
    results.last[member, rows, here] = context
    group.finish()


def moments(group: Cluster, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and 1 / standard deviation of whole rows, `[R]` each, from this block's columns of them, `[R, 64]`.

    Each block gives the mean of its columns and the sum of squared deviations from that; both are merged as in
    `gpu_group.MixedContexts`.
    """
    mean = jnp.sum(x, 1) / COLUMNS
    off = x - by_rows(mean)
    means, squares = group.exchange_row_values((mean, jnp.sum(off * off, 1)))
    mean = sum_over_blocks(means) / group.blocks
    parts = [square + COLUMNS * (each - mean) * (each - mean) for each, square in zip(means, squares, strict=True)]
    return mean, lax.rsqrt(sum_over_blocks(parts) / (group.blocks * COLUMNS) + NORM_EPSILON)
