"""The GPU kernels of a stage's update: products of few tokens with large kernels, and AdamW in one pass.

An update reads every weight for some tens of tokens, so its time is memory traffic and the latency of each launch, not
arithmetic. Three things are done about that:

  - A product is divided along its inner dimension too, in *pieces*, so that enough thread blocks read at the same time.
    Each piece's partial sum is a result of its own; XLA adds them up, together with what follows.
  - RMSNorm is part of the product that follows it, and its backward pass adds up the pieces of the one before it.
  - `adamw` computes each tile of a gradient where it is applied. No gradient of a kernel is ever written to memory.

In shapes, B is the tokens of a batch, L the layers of a stack, P the pieces of an inner dimension. `single_token.py`
has the equations of the model. "Kernel" below is a kernel of the GPU; those of the model are called weights.

Written for Pallas's Triton back end; `fused_step.py` calls these.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from newllm_jax.training.optimizer import BETAS, EPSILON

TILE = 64  # every width is a multiple of it
ADAMW_ROWS, ADAMW_WARPS = 16, 4  # of a thread block of `adamw`: its rows of a weight, and its warps


class ProductTiling(NamedTuple):
    """How a product is divided among thread blocks.

    Attributes:
      columns: of the result, for a thread block.
      depth: size of a piece of the inner dimension, at most.
      warps: of a thread block.
      stages: tiles in flight from device memory: the depth of the software pipeline.
    """

    columns: int
    depth: int
    warps: int
    stages: int


class ParameterAndMoments(NamedTuple):
    """A stack of weights with Adam's moments, each `[L, in, out]`.

    Attributes:
      parameter: the weights.
      mean: the running mean of the gradient.
      square: the running mean of its square.
    """

    parameter: jax.Array
    mean: jax.Array
    square: jax.Array


PRODUCT_TILING = ProductTiling(columns=64, depth=64, warps=4, stages=2)  # the fastest measured on an H200


def forward(
    x: jax.Array,
    stacks: list[jax.Array],
    layer: int,
    scales: jax.Array | None,
    *,
    epsilon: float,
    precision: Any,
    interpret: bool = False,
) -> list[jax.Array]:
    """`single_token.Products.forward`, for stacks of one shape: RMSNorm(x) W for each W, or x W without scales.

    RMSNorm divides a row by one number, so that division can follow the product, for which no block has to wait:

        RMSNorm(x) W = ((x * scale) W) / sqrt(mean(x^2) + epsilon)

    Args:
      x: `[B, in]`, B a power of two from 16.
      epsilon: of the RMSNorm.
      interpret: without a GPU, for tests.
    """
    norm_scales = [] if scales is None else [scales]
    *partial_sums, squares = _products([x], stacks, layer, norm_scales, False, precision, interpret)
    results = [jnp.sum(pieces, 0) for pieces in partial_sums]
    if scales is None:
        return results
    mean = jnp.sum(squares, 0) / x.shape[1]
    return [result * jax.lax.rsqrt(mean + epsilon)[:, None] for result in results]


def backward(
    d_results: list[jax.Array], stacks: list[jax.Array], layer: int, *, precision: Any, interpret: bool = False
) -> jax.Array:
    """`single_token.Products.backward`, for stacks of one shape: the sum of d_y W^T."""
    return jnp.sum(_products(d_results, stacks, layer, [], True, precision, interpret)[0], 0)


def norm_backward(
    d_results: list[jax.Array],
    stacks: list[jax.Array],
    layer: int,
    scales: jax.Array,
    x: jax.Array,
    d_residual: jax.Array,
    *,
    epsilon: float,
    precision: Any,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`single_token.Products.norm_backward`, for stacks of one shape: two kernels, the products and the norm."""
    partial_sums, _ = _products(d_results, stacks, layer, [], True, precision, interpret)
    d_normed, d_x = pl.pallas_call(
        partial(_norm_backward_kernel, epsilon),
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32)] * 2,
        grid=(len(x),),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(jnp.array([layer], jnp.int32), partial_sums, scales, x, d_residual)
    return d_normed, d_x


def _norm_backward_kernel(
    epsilon: float, layer: Any, partial_sums: Any, scales: Any, x: Any, d_residual: Any, *results: Any
) -> None:
    """The backward pass of RMSNorm; a thread block a token, so the sums below are over the columns of its row.

        d_normed = sum of the pieces                            the gradient of n = unit * scale
        unit     = x / r                                        r = sqrt(mean(x^2) + epsilon)
        d_unit   = d_normed * scale
        d_x      = d_residual + (d_unit - unit * mean(unit * d_unit)) / r

    Args:
      layer: `[1]`, the row of `scales`.
      partial_sums: `[P, B, H]`.
      scales: `[L, H]`.
      x, d_residual: `[B, H]`.
      results: d_normed and d_x, `[B, H]`.
    """
    hidden, row = x.shape[1], pl.program_id(0)
    # Triton's blocks are powers of two: a row is loaded as one, with a mask. Its start is computed (as 0), for JAX from
    # 0.12 on refuses a slice that it can see to be too wide, whatever the mask.
    width = pl.next_power_of_2(hidden)
    columns, in_row = pl.ds(row * 0, width), jax.lax.iota(jnp.int32, width) < hidden

    def load(ref: Any, *index: Any) -> jax.Array:
        shape = (*[1] * len(index), width)
        place = ref.at[(*(pl.ds(i, 1) for i in index), columns)]
        return plgpu.load(place, mask=in_row.reshape(shape), other=0.0).reshape(width)

    pieces = range(1, partial_sums.shape[0])
    d_normed = sum((load(partial_sums, piece, row) for piece in pieces), start=load(partial_sums, 0, row))
    value = load(x, row)
    inverse = jax.lax.rsqrt(jnp.sum(value * value) / hidden + epsilon)
    unit, d_unit = value * inverse, d_normed * load(scales, layer[0])
    d_x = load(d_residual, row) + (d_unit - unit * (jnp.sum(unit * d_unit) / hidden)) * inverse
    for ref, result in zip(results, (d_normed, d_x), strict=True):
        plgpu.store(ref.at[row, columns], result, mask=in_row)


def _products(
    operands: list[jax.Array],
    stacks: list[jax.Array],
    layer: int,
    scales: list[jax.Array],
    transposed: bool,
    precision: Any,
    interpret: bool,
) -> list[jax.Array]:
    """The partial sums of products with one layer's weights W; those of the whole are their sums over the pieces.

        plain:       y_W = (x * scale) W, for each W            one operand x `[B, in]`, weights `[L, in, out]`
        transposed:  y   = sum of x_W W^T over all W            an operand x_W `[B, in]` per W, weights `[L, out, in]`

    Args:
      scales: of the RMSNorm before a plain product, one stack `[L, in]`; or none.
      layer: an argument of the kernel, not a constant of it: one compiled kernel serves all layers.

    Returns:
      The partial sums of each y, `[P, B, out]`, and last those of the squares of x, `[P, B]`, which are written only
      where there are scales.
    """
    (tokens, inner), outer = operands[0].shape, stacks[0].shape[1 if transposed else 2]
    columns, most = PRODUCT_TILING.columns, min(PRODUCT_TILING.depth, inner)
    depth = max(size for size in range(TILE, most + 1, TILE) if inner % size == 0)
    counts, pieces = (len(operands), len(stacks), len(scales)), inner // depth
    shapes = [(pieces, tokens, outer)] * (1 if transposed else len(stacks)) + [(pieces, tokens)]
    return pl.pallas_call(
        partial(_product_kernel, counts, columns, depth, transposed, precision),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(outer // columns, pieces),
        compiler_params=plgpu.CompilerParams(num_warps=PRODUCT_TILING.warps, num_stages=PRODUCT_TILING.stages),
        interpret=interpret,
    )(jnp.array([layer], jnp.int32), *operands, *stacks, *scales)


def _product_kernel(
    counts: tuple[int, int, int], columns: int, depth: int, transposed: bool, precision: Any, layer: Any, *refs: Any
) -> None:
    """One thread block: some columns of the results of `_products`, one piece of the inner dimension.

    It adds up the piece's tiles; blocks of the first columns also add up the squares of their piece of x.

    Args:
      counts: of the references that are operands, stacks and scales, in this order; the results follow.
      columns: of the results.
      depth: size of the piece.
      layer: `[1]`.
    """
    references = iter(refs)
    operands, stacks, scales = ([next(references) for _ in range(count)] for count in counts)
    *results, squares = references
    here, piece, number = pl.ds(pl.program_id(0) * columns, columns), pl.program_id(1), layer[0]
    dot = partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

    def add_tile(step: Any, carry: tuple[list[jax.Array], jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        sums, squared = carry
        inner = pl.ds(piece * depth + step * TILE, TILE)
        if transposed:
            [y] = sums
            for x, w in zip(operands, stacks, strict=True):
                y += dot(x[:, inner], w[number, here, inner].T)
            return [y], squared
        x = operands[0][:, inner]
        if scales:
            squared += jnp.sum(x * x, 1)
            x *= scales[0][number, inner][None, :]
        return [y + dot(x, w[number, inner, here]) for y, w in zip(sums, stacks, strict=True)], squared

    tokens = operands[0].shape[0]
    zeros = [jnp.zeros((tokens, columns), jnp.float32)] * len(results), jnp.zeros((tokens,), jnp.float32)
    sums, squared = jax.lax.fori_loop(0, depth // TILE, add_tile, zeros)
    for result, y in zip(results, sums, strict=True):
        result[piece, :, here] = y
    if scales:

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            squares[piece, :] = squared


def adamw(
    before: ParameterAndMoments,
    x: jax.Array,
    d_y: jax.Array,
    count: jax.Array,
    *,
    learning_rate: float,
    weight_decay: float,
    precision: jax.lax.PrecisionLike,
    interpret: bool = False,
) -> tuple[ParameterAndMoments, jax.Array]:
    """One update of a stack of weights by AdamW, as `optax.adamw` does it, from the factors of their gradient x^T d_y.

    Args:
      before: its memory is reused for the result.
      x: `[L, B, in]`, the left operand of the product with the weights, B a power of two from 16.
      d_y: `[L, B, out]`, the gradient of the result of that product.
      count: this update's number, from 1.

    Returns:
      Weights and moments after the update, and the sums of the squares of the gradient by thread block: the gradient's
      norm is the square root of their sum.
    """
    layers, inner, outer = before.parameter.shape
    corrections = 1 - jnp.array(BETAS) ** count
    grid = outer // TILE, inner // ADAMW_ROWS, layers  # blocks that start together read neighbours in memory
    kernel = partial(_adamw_kernel, height=ADAMW_ROWS, rate=learning_rate, decay=weight_decay, precision=precision)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*[before.parameter.shape] * 3, grid)]
    *updated, squares = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=grid,
        input_output_aliases={0: 0, 1: 1, 2: 2},
        compiler_params=plgpu.CompilerParams(num_warps=ADAMW_WARPS, num_stages=1),
        interpret=interpret,
    )(*before, x, d_y, corrections)
    return ParameterAndMoments(*updated), squares


def _adamw_kernel(
    parameter: Any, mean: Any, square: Any, x: Any, d_y: Any, corrections: Any,
    new_parameter: Any, new_mean: Any, new_square: Any, squares: Any,
    *, height: int, rate: float, decay: float, precision: Any,
) -> None:  # fmt: skip
    """One tile of the weights p of one layer, `height` rows by TILE columns (Loshchilov & Hutter 2019):

        g  = x^T d_y
        m' = beta_1 * m + (1 - beta_1) * g
        v' = beta_2 * v + (1 - beta_2) * g^2
        p' = p - rate * (m' / (1 - beta_1^n) / (sqrt(v' / (1 - beta_2^n)) + epsilon) + decay * p)

    Args:
      corrections: `[2]`, 1 - beta_1^n and 1 - beta_2^n for the n-th update.
      squares: the sum of g^2 of each tile.
    """
    column, row, layer = (pl.program_id(axis) for axis in range(3))
    rows, columns = pl.ds(row * height, height), pl.ds(column * TILE, TILE)
    tile = layer, rows, columns
    gradient = jnp.dot(
        x[layer, :, rows].T, d_y[layer, :, columns], precision=precision, preferred_element_type=jnp.float32
    )
    beta_1, beta_2 = BETAS
    old = parameter[tile]
    first = beta_1 * mean[tile] + (1 - beta_1) * gradient
    second = beta_2 * square[tile] + (1 - beta_2) * gradient * gradient
    update = first / corrections[0] / (jnp.sqrt(second / corrections[1]) + EPSILON) + decay * old
    new_parameter[tile] = old - rate * update
    new_mean[tile] = first
    new_square[tile] = second
    squares[column, row, layer] = jnp.sum(gradient * gradient)
