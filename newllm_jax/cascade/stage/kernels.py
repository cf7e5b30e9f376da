"""The GPU kernels of a stage's update: products of few tokens with large weights, and AdamW in one pass.

An update reads every weight for some tens of tokens, so what it costs is memory traffic and the wait at the start of
every kernel. A product reads its layer of a stack in place and cuts the inner dimension too, so that enough thread
blocks read at once. `adamw` forms each gradient where it is used: none is ever written.

Written for Pallas's Triton backend; `fused_step.py` calls these.
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
ROWS, WARPS = 16, 4  # of a thread block of `adamw`


class Cut(NamedTuple):
    """How a product is cut.

    Attributes:
      columns: of the result, for a thread block.
      depth: of the inner dimension, for a thread block, at most.
      warps: of a thread block.
      stages: loads in flight.
    """

    columns: int
    depth: int
    warps: int
    stages: int


class Trained(NamedTuple):
    """A stack of kernels and its moments, those of the gradient and of its square."""

    param: jax.Array
    mean: jax.Array
    square: jax.Array


CUT = Cut(columns=64, depth=64, warps=4, stages=2)  # what measured best on an H200


def forward(
    operand: jax.Array,
    stacks: list[jax.Array],
    layer: int,
    scales: jax.Array | None,
    *,
    epsilon: float,
    precision: Any,
    interpret: bool = False,
) -> list[jax.Array]:
    """`single_token.Products.forward`, of stacks of one shape; the tokens are a power of two from 16 on.

    Args:
      epsilon: of the RMSNorm.
      interpret: without a GPU, for tests.
    """
    normed = [] if scales is None else [scales]
    *parts, squares = _products([operand], stacks, layer, normed, False, precision, interpret)
    results = [jnp.sum(part, 0) for part in parts]
    if scales is None:
        return results
    mean = jnp.sum(squares, 0) / operand.shape[1]
    return [result * jax.lax.rsqrt(mean + epsilon)[:, None] for result in results]


def backward(
    gradients: list[jax.Array], stacks: list[jax.Array], layer: int, *, precision: Any, interpret: bool = False
) -> jax.Array:
    """`single_token.Products.backward`, likewise."""
    return jnp.sum(_products(gradients, stacks, layer, [], True, precision, interpret)[0], 0)


def backward_normed(
    gradients: list[jax.Array],
    stacks: list[jax.Array],
    layer: int,
    scales: jax.Array,
    x: jax.Array,
    d_around: jax.Array,
    *,
    epsilon: float,
    precision: Any,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`single_token.Products.backward_normed`, likewise: the pieces' sum and the norm's gradient in one kernel."""
    parts, _ = _products(gradients, stacks, layer, [], True, precision, interpret)
    d_normed, d_x = pl.pallas_call(
        partial(_norm_kernel, epsilon),
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32)] * 2,
        grid=(len(x),),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(jnp.array([layer], jnp.int32), parts, scales, x, d_around)
    return d_normed, d_x


def _norm_kernel(epsilon: float, layer: Any, parts: Any, scales: Any, x: Any, d_around: Any, *results: Any) -> None:
    """One token: its gradient through the norm from the pieces of that of the normed operand."""
    hidden, row = x.shape[1], pl.program_id(0)
    width = pl.next_power_of_2(hidden)
    # The start is computed, for JAX from 0.12 on refuses a slice that it sees to be too wide, whatever the mask.
    columns, present = pl.ds(row * 0, width), jax.lax.iota(jnp.int32, width) < hidden

    def load(ref: Any, *index: Any) -> jax.Array:
        shape = (*[1] * len(index), width)
        place = ref.at[(*(pl.ds(i, 1) for i in index), columns)]
        return plgpu.load(place, mask=present.reshape(shape), other=0.0).reshape(width)

    d_normed = sum((load(parts, piece, row) for piece in range(1, parts.shape[0])), start=load(parts, 0, row))
    value = load(x, row)
    inverse = jax.lax.rsqrt(jnp.sum(value * value) / hidden + epsilon)
    unit, d_unit = value * inverse, d_normed * load(scales, layer[0])
    d_x = load(d_around, row) + (d_unit - unit * (jnp.sum(unit * d_unit) / hidden)) * inverse
    for ref, result in zip(results, (d_normed, d_x), strict=True):
        plgpu.store(ref.at[row, columns], result, mask=present)


def _products(
    operands: list[jax.Array],
    stacks: list[jax.Array],
    layer: int,
    scales: list[jax.Array],
    transposed: bool,
    precision: Any,
    interpret: bool,
) -> list[jax.Array]:
    """One operand by each kernel; or, transposed, the sum of each operand by its kernel.

    Args:
      scales: none, or one stack `[layers, in]` whose row the operand is multiplied with first.

    Returns:
      By result, what each piece of the inner dimension adds to it; and to the sums of the operand's squares.
    """
    (tokens, inner), outer = operands[0].shape, stacks[0].shape[1 if transposed else 2]
    depth = max(size for size in range(TILE, min(CUT.depth, inner) + 1, TILE) if inner % size == 0)
    sizes = len(operands), len(stacks), len(scales), CUT.columns, depth
    shapes = [(inner // depth, tokens, outer)] * (1 if transposed else len(stacks)) + [(inner // depth, tokens)]
    return pl.pallas_call(
        partial(_product_kernel, sizes, transposed, precision),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(outer // CUT.columns, inner // depth),
        compiler_params=plgpu.CompilerParams(num_warps=CUT.warps, num_stages=CUT.stages),
        interpret=interpret,
    )(jnp.array([layer], jnp.int32), *operands, *stacks, *scales)


def _product_kernel(sizes: tuple[int, ...], transposed: bool, precision: Any, layer: Any, *refs: Any) -> None:
    operands, stacks, scales, columns, depth = sizes
    given = iter(refs)
    xs, ws, norms = ([next(given) for _ in range(count)] for count in (operands, stacks, scales))
    *parts, squares = given
    here, piece, number = pl.ds(pl.program_id(0) * columns, columns), pl.program_id(1), layer[0]
    dot = partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

    def add(step: Any, carry: tuple[list[jax.Array], jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        sums, squared = carry
        inner = pl.ds(piece * depth + step * TILE, TILE)
        if transposed:
            [total] = sums
            for x, w in zip(xs, ws, strict=True):
                total += dot(x[:, inner], w[number, here, inner].T)
            return [total], squared
        x = xs[0][:, inner]
        if norms:
            squared += jnp.sum(x * x, 1)
            x *= norms[0][number, inner][None, :]
        return [total + dot(x, w[number, inner, here]) for total, w in zip(sums, ws, strict=True)], squared

    tokens = xs[0].shape[0]
    zeros = [jnp.zeros((tokens, columns), jnp.float32)] * len(parts), jnp.zeros((tokens,), jnp.float32)
    sums, squared = jax.lax.fori_loop(0, depth // TILE, add, zeros)
    for part, total in zip(parts, sums, strict=True):
        part[piece, :, here] = total
    if norms:

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            squares[piece, :] = squared


def adamw(
    trained: Trained,
    operand: jax.Array,
    d_result: jax.Array,
    count: jax.Array,
    *,
    learning_rate: float,
    weight_decay: float,
    precision: jax.lax.PrecisionLike,
    interpret: bool = False,
) -> tuple[Trained, jax.Array]:
    """One update of a stack of kernels by AdamW, as Optax's, from what its gradient is the product of.

    Args:
      trained: `[layers, in, out]` each.
      operand: `[layers, tokens, in]`, tokens a power of two from 16 on.
      d_result: `[layers, tokens, out]`.
      count: this update's number, from 1.

    Returns:
      The same, written over what was given, and the gradient's sums of squares, by tile.
    """
    layers, inner, outer = trained.param.shape
    corrections = 1 - jnp.array(BETAS) ** count
    grid = outer // TILE, inner // ROWS, layers  # neighbours in memory are neighbours in time
    kernel = partial(_adamw_kernel, height=ROWS, rate=learning_rate, decay=weight_decay, precision=precision)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*[trained.param.shape] * 3, grid)]
    *updated, squares = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=grid,
        input_output_aliases={0: 0, 1: 1, 2: 2},
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )(*trained, operand, d_result, corrections)
    return Trained(*updated), squares


def _adamw_kernel(
    param: Any, mean: Any, square: Any, operand: Any, d_result: Any, corrections: Any,
    new_param: Any, new_mean: Any, new_square: Any, squares: Any,
    *, height: int, rate: float, decay: float, precision: Any,
) -> None:  # fmt: skip
    column, row, layer = (pl.program_id(axis) for axis in range(3))
    rows, columns = pl.ds(row * height, height), pl.ds(column * TILE, TILE)
    here = layer, rows, columns
    gradient = jnp.dot(
        operand[layer, :, rows].T, d_result[layer, :, columns], precision=precision, preferred_element_type=jnp.float32
    )
    first, second = BETAS
    old = param[here]
    moved = first * mean[here] + (1 - first) * gradient
    spread = second * square[here] + (1 - second) * gradient * gradient
    update = moved / corrections[0] / (jnp.sqrt(spread / corrections[1]) + EPSILON) + decay * old
    new_param[here] = old - rate * update
    new_mean[here] = moved
    new_square[here] = spread
    squares[column, row, layer] = jnp.sum(gradient * gradient)
