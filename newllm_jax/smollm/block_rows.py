"""A thread block's share of the products of a GPU kernel with vectors: whole rows of matrices, in slices of columns.

A slice of some rows of a matrix is `[chunks, rows, CHUNK]`. Triton deals out the last axis to the threads of a warp,
the axis before to warps, and the rest to the registers of a thread. So a warp has whole rows, and no sum of products
has to wait for other warps. A slice of a vector is `[chunks, rows, CHUNK]` too, the same for each row: what a warp
needs, it loads itself. Sizes are powers of two: a row of 640 numbers is two slices, of 4 chunks and of 1.

Written for Pallas's Triton back end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from newllm_jax.smollm.kernel_shares import CHUNK, padded, tile_rows, whole_slice

LANES = 32  # the threads of a warp


class Slice(NamedTuple):
    """Some chunks of a row; their number is a power of two."""

    first: int
    chunks: int

    def load(
        self, reference: Any, index: tuple[Any, ...], shape: tuple[int, ...], axis: int = 0, added: Any = 0
    ) -> Any:
        """From the last axis of a reference; 0 for what is behind its end.

        Args:
          index: in the other axes.
          shape: of the result, whose last axis are the columns of a chunk.
          axis: that of the chunks.
          added: to the columns: zeros of which the compiler does not know that they are, so that it knows less of the
            addresses.
        """
        chunks, within = (jax.lax.broadcasted_iota(jnp.int32, shape, each) for each in (axis, len(shape) - 1))
        columns = (self.first + chunks) * CHUNK + within
        if (self.first + self.chunks) * CHUNK <= reference.shape[-1]:
            return reference[*index, columns + added]
        return plgpu.load(reference.at[*index, columns + added], mask=columns < reference.shape[-1], other=0.0)


def slices_of(width: int) -> list[Slice]:
    """A row that is filled up to whole chunks, in slices, the largest first.

    Few large slices compile faster than many small ones: for every load, Triton's compiler looks at all operations that
    have to do with it. With slices of 64 columns, the layers of SmolLM2-135M took it minutes.
    """
    slices, first, chunks = [], 0, padded(width) // CHUNK
    while first < chunks:
        slices.append(Slice(first, 1 << (chunks - first).bit_length() - 1))
        first += slices[-1].chunks
    return slices


def one_slice(width: int) -> list[Slice]:
    """A row in one slice, with chunks behind its end."""
    return [Slice(0, whole_slice(width) // CHUNK)]


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

    def load(
        self, matrix: Any, layer: Any, first: int = 0, slices: Callable[[int], list[Slice]] = slices_of
    ) -> list[list[jax.Array]]:
        """Per tile the slices of its rows of a layer's matrix `[L, out, in]`, whose rows begin with `first`.

        A thread shall load 4 numbers at a time, so that the threads of a warp have one chunk of one row. Of bfloat16
        Triton would load 8, a warp would have two rows, and 8 rows would be too few for 8 warps. So it must not know
        that addresses are multiples of 8 numbers.
        """
        rows = [(first + start + jax.lax.iota(jnp.int32, self.size))[None, :, None] for start in self.starts]
        parts, zero = slices(matrix.shape[-1]), 4 * self.opaque_zero
        return [[part.load(matrix, (layer, row), self._shape(part), added=zero) for part in parts] for row in rows]

    def load_vector(self, vector: Any, *index: Any) -> list[jax.Array]:
        """The last axis of a reference in slices, for the products with a tile."""
        return [part.load(vector, index, self._shape(part)) for part in slices_of(vector.shape[-1])]

    def _shape(self, part: Slice) -> tuple[int, int, int]:
        return part.chunks, self.size, CHUNK

    def store(self, vector: Any, layer: Any, parts: list[jax.Array]) -> None:
        """Writes this block's part of a layer's `[L, rows]`, an array for each tile.

        Each warp writes the rows that it has. In a store of `[rows]`, other threads than those that have the numbers
        would write them, and all warps would wait for each other. So it is one of `[rows, LANES]`, of which only the
        first column is written; the compiler must not know that rows are next to each other in memory.
        """
        shape = self.size, LANES
        first = jax.lax.broadcasted_iota(jnp.int32, shape, 1) == 0
        rows = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * (1 + self.opaque_zero)
        for start, part in zip(self.starts, parts, strict=True):
            plgpu.store(vector.at[layer, start + rows], jnp.broadcast_to(part[:, None], shape), mask=first)


def products(tiles: list[list[jax.Array]], x: list[jax.Array]) -> list[jax.Array]:
    """Per tile the products of its rows with a vector: `[rows]`."""
    return [_row_sums([rows.astype(jnp.float32) * part for rows, part in zip(tile, x, strict=True)]) for tile in tiles]


def inverse_rms(x: list[jax.Array], width: int, epsilon: float) -> jax.Array:
    """1 / sqrt(mean(x^2) + epsilon) of a vector of so many numbers, for each row of a tile: `[rows]`."""
    return jax.lax.rsqrt(_row_sums([part * part for part in x]) / width + epsilon)


def _row_sums(slices: list[jax.Array]) -> jax.Array:
    """Of `[chunks, rows, CHUNK]` each. The sum over chunks comes first: it stays within a thread."""
    return jnp.sum(reduce(operator.add, [jnp.sum(each, 0) for each in slices]), 1)
