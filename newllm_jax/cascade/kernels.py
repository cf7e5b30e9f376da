"""The GPU kernels of a stage's update: products of few tokens with large weights, and AdamW in one pass.

An update reads every weight for some tens of tokens, so what it costs is memory traffic and the wait at the start of
every kernel. `products` reads its layer of a stack in place and cuts the inner dimension too, so that enough thread
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

ADAMW = 32, 4
TILE = 64  # every width is a multiple of it


class Cut(NamedTuple):
    """How a product is cut.

    Attributes:
      columns: of the result, for a thread block.
      depth: the share of the inner dimension for a thread block, at most.
      warps: of a thread block.
      stages: loads in flight.
    """

    columns: int = 16
    depth: int = 192
    warps: int = 4
    stages: int = 3


class Trained(NamedTuple):
    """A stack of kernels and its moments, those of the gradient and of its square."""

    param: jax.Array
    mean: jax.Array
    square: jax.Array


CUT = Cut()  # what measured best on an H200


def products(
    operands: list[jax.Array],
    stacks: list[jax.Array],
    layer: int,
    transposed: bool,
    *,
    precision: jax.lax.PrecisionLike,
    cut: Cut = CUT,
    interpret: bool = False,
) -> list[jax.Array]:
    """As `single_token.Products`, of operands of one shape with kernels of one shape.

    Args:
      operands: `[tokens, in]`, where the number of tokens is a power of two from 16 on.
      interpret: without a GPU, for tests.
    """
    (tokens, inner), outer = operands[0].shape, stacks[0].shape[1 if transposed else 2]
    share = max(size for size in range(TILE, min(cut.depth, inner) + 1, TILE) if inner % size == 0)
    kernel = partial(
        _product_kernel, count=len(stacks), share=share, transposed=transposed, precision=precision, cut=cut
    )
    parts = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((inner // share, tokens, outer), jnp.float32)] * len(stacks),
        grid=(outer // cut.columns, inner // share, len(stacks)),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=interpret,
    )(jnp.array([layer], jnp.int32), *operands, *stacks)
    return [jnp.sum(part, 0) for part in parts]


def _product_kernel(layer: Any, *refs: Any, count: int, share: int, transposed: bool, precision: Any, cut: Cut) -> None:
    operands, stacks, parts = refs[:count], refs[count : 2 * count], refs[2 * count :]
    columns, piece = pl.ds(pl.program_id(0) * cut.columns, cut.columns), pl.program_id(1)
    number = layer[0]
    for index, (operand, stack, part) in enumerate(zip(operands, stacks, parts, strict=True)):

        @pl.when(pl.program_id(2) == index)
        def _(operand: Any = operand, stack: Any = stack, part: Any = part) -> None:
            def add(step: Any, total: jax.Array) -> jax.Array:
                inner = pl.ds(piece * share + step * TILE, TILE)
                kernel = stack[number, columns, inner].T if transposed else stack[number, inner, columns]
                return total + jnp.dot(
                    operand[:, inner], kernel, precision=precision, preferred_element_type=jnp.float32
                )

            zeros = jnp.zeros((operand.shape[0], cut.columns), jnp.float32)
            part[piece, :, columns] = jax.lax.fori_loop(0, share // TILE, add, zeros)


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
      The same, written over what was given, and the gradient's sum of squares.
    """
    layers, inner, outer = trained.param.shape
    corrections = 1 - jnp.array(BETAS) ** count
    grid = outer // TILE, inner // ADAMW[0], layers  # neighbours in memory are neighbours in time
    kernel = partial(_adamw_kernel, rate=learning_rate, decay=weight_decay, precision=precision)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*[trained.param.shape] * 3, grid)]
    *updated, squares = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=grid,
        input_output_aliases={0: 0, 1: 1, 2: 2},
        compiler_params=plgpu.CompilerParams(num_warps=ADAMW[1], num_stages=1),
        interpret=interpret,
    )(*trained, operand, d_result, corrections)
    return Trained(*updated), jnp.sum(squares)


def _adamw_kernel(
    param: Any, mean: Any, square: Any, operand: Any, d_result: Any, corrections: Any,
    new_param: Any, new_mean: Any, new_square: Any, squares: Any, *, rate: float, decay: float, precision: Any,
) -> None:  # fmt: skip
    column, row, layer = (pl.program_id(axis) for axis in range(3))
    rows, columns = pl.ds(row * ADAMW[0], ADAMW[0]), pl.ds(column * TILE, TILE)
    here = layer, rows, columns
    old, moved, spread = param[here], mean[here], square[here]  # on their way before the product begins
    gradient = jnp.dot(
        operand[layer, :, rows].T, d_result[layer, :, columns], precision=precision, preferred_element_type=jnp.float32
    )
    first, second = BETAS
    moved = first * moved + (1 - first) * gradient
    spread = second * spread + (1 - second) * gradient * gradient
    update = moved / corrections[0] / (jnp.sqrt(spread / corrections[1]) + EPSILON) + decay * old
    new_param[here] = old - rate * update
    new_mean[here] = moved
    new_square[here] = spread
    squares[column, row, layer] = jnp.sum(gradient * gradient)
