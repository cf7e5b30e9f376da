"""A thread block's share of the products of a GPU kernel with vectors: whole rows of matrices, in slices of columns.

A slice of some rows of a matrix is `[chunks, rows, CHUNK]`. Triton deals out the last axis to the threads of a warp,
the axis before to warps, and the rest to the registers of a thread. So a warp has whole rows, and no sum of products
has to wait for other warps. A slice of a vector is `[chunks, rows, CHUNK]` too, the same for each row: what a warp
needs, it loads itself. Sizes are powers of two: a row of 640 numbers is two slices, of 4 chunks and of 1.

Written for Pallas's Triton back end.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from newllm_jax.smollm.kernel_shares import CHUNK, padded, tile_rows


def columns_of(width: int) -> list[jax.Array]:
    """The columns of each slice of a row that is filled up to whole chunks, `[chunks, CHUNK]`, the largest slice first.

    Few large slices compile faster than many small ones: for every load, Triton's compiler looks at all operations that
    have to do with it. With slices of 64 columns, the layers of SmolLM2-135M took it minutes.
    """
    slices, first, chunks = [], 0, padded(width) // CHUNK
    while first < chunks:
        count = 1 << (chunks - first).bit_length() - 1
        within = first + jax.lax.iota(jnp.int32, count)
        slices.append(within[:, None] * CHUNK + jax.lax.iota(jnp.int32, CHUNK)[None, :])
        first += count
    return slices


def load_filled(vector: Any, index: tuple[Any, ...], columns: jax.Array) -> jax.Array:
    """These columns of the last axis of a reference; 0 for those behind its end."""
    if vector.shape[-1] % CHUNK == 0:
        return vector[*index, columns]
    return plgpu.load(vector.at[*index, columns], mask=columns < vector.shape[-1], other=0.0)


class BlockRows:
    """The rows of a matrix of which a block computes the products with a vector.

    The last blocks may have the same rows as others: they compute the same, and write the same.

    Attributes:
      starts: the first row of each of the block's tiles.
      size: rows of a tile.
      opaque_zero: a zero of which the compiler does not know that it is one, see `load`.
    """

    def __init__(self, rows: int, rank: Any, blocks: int, opaque_zero: Any) -> None:
        self.size, tiles = tile_rows(rows, blocks)
        self.opaque_zero = opaque_zero
        self.starts = [jnp.minimum((rank * tiles + tile) * self.size, rows - self.size) for tile in range(tiles)]

    def load(self, matrix: Any, layer: Any, first: int = 0) -> list[list[jax.Array]]:
        """Per tile the slices of its rows of a layer's matrix `[L, out, in]`, whose rows begin with `first`.

        A thread shall load 4 numbers at a time, so that the threads of a warp have one chunk of one row. Of bfloat16
        Triton would load 8, a warp would have two rows, and 8 rows would be too few for 8 warps. So it must not know
        that addresses are multiples of 8 numbers.
        """
        rows = [(first + start + jax.lax.iota(jnp.int32, self.size))[None, :, None] for start in self.starts]
        slices = [columns[:, None, :] + 4 * self.opaque_zero for columns in columns_of(matrix.shape[-1])]
        return [[matrix[layer, each, columns] for columns in slices] for each in rows]

    def load_vector(self, vector: Any, *index: Any) -> list[jax.Array]:
        """The last axis of a reference in slices, for the products with a tile."""
        shapes = [(columns, (len(columns), self.size, CHUNK)) for columns in columns_of(vector.shape[-1])]
        return [load_filled(vector, index, jnp.broadcast_to(columns[:, None, :], shape)) for columns, shape in shapes]

    def store(self, vector: Any, layer: Any, parts: list[jax.Array]) -> None:
        """Writes this block's part of a layer's `[L, rows]`, an array for each tile."""
        for start, part in zip(self.starts, parts, strict=True):
            vector[layer, start + jax.lax.iota(jnp.int32, self.size)] = part


def products(tiles: list[list[jax.Array]], x: list[jax.Array]) -> list[jax.Array]:
    """Per tile the products of its rows with a vector: `[rows]`."""
    return [_row_sums([rows.astype(jnp.float32) * part for rows, part in zip(tile, x, strict=True)]) for tile in tiles]


def inverse_rms(x: list[jax.Array], width: int, epsilon: float) -> jax.Array:
    """1 / sqrt(mean(x^2) + epsilon) of a vector of so many numbers, for each row of a tile: `[rows]`."""
    return jax.lax.rsqrt(_row_sums([part * part for part in x]) / width + epsilon)


def _row_sums(slices: list[jax.Array]) -> jax.Array:
    """Of `[chunks, rows, CHUNK]` each. The sum over chunks comes first: it stays within a thread."""
    return jnp.sum(reduce(operator.add, [jnp.sum(each, 0) for each in slices]), 1)
