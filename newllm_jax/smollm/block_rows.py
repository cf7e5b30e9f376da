"""A thread block's share of the products of a GPU kernel with vectors: whole rows of matrices, in slices of columns.

Triton's arrays have sizes that are powers of two, so a row of 576 numbers is two slices, of 512 and 64. Written for
Pallas's Triton back end.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from newllm_jax.smollm.kernel_shares import tile_rows

WIDEST_SLICE = 1024  # columns of a matrix that are loaded at a time, at most


def slices_of(width: int) -> list[tuple[int, int]]:
    """First column and number of columns of the slices of a row, the largest slice first.

    Few large slices compile faster than many small ones: for every load, Triton's compiler looks at all operations that
    have to do with it. With slices of 64 columns, the layers of SmolLM2-135M took it minutes.
    """
    slices, first = [], 0
    while first < width:
        size = min(1 << (width - first).bit_length() - 1, WIDEST_SLICE)
        slices.append((first, size))
        first += size
    return slices


def load_slices(vector: Any, *index: Any) -> list[jax.Array]:
    """The last axis of a reference in slices."""
    return [vector[*index, pl.ds(first, size)] for first, size in slices_of(vector.shape[-1])]


class BlockRows:
    """The rows of a matrix of which a block computes the products with a vector.

    The last blocks may have the same rows as others: they compute the same, and write the same.

    Attributes:
      starts: the first row of each of the block's tiles.
      size: rows of a tile.
    """

    def __init__(self, rows: int, rank: Any, blocks: int) -> None:
        self.size, tiles = tile_rows(rows, blocks)
        self.starts = [jnp.minimum((rank * tiles + tile) * self.size, rows - self.size) for tile in range(tiles)]

    def load(self, matrix: Any, layer: Any, first: int = 0) -> list[list[jax.Array]]:
        """Per tile the slices of its rows of a layer's matrix `[L, out, in]`, whose rows begin with `first`."""
        return [load_slices(matrix, layer, pl.ds(first + start, self.size)) for start in self.starts]

    def store(self, vector: Any, layer: Any, parts: list[jax.Array]) -> None:
        """Writes this block's part of a layer's `[L, rows]`, an array for each tile."""
        for start, part in zip(self.starts, parts, strict=True):
            vector[layer, pl.ds(start, self.size)] = part


def product(tiles: list[list[jax.Array]], x: list[jax.Array]) -> list[jax.Array]:
    """Per tile the products of its rows with a vector that is given in slices."""

    def tile_product(slices: list[jax.Array]) -> jax.Array:
        sums = [jnp.sum(tile.astype(jnp.float32) * part[None, :], 1) for tile, part in zip(slices, x, strict=True)]
        return reduce(operator.add, sums)

    return [tile_product(slices) for slices in tiles]


def normed(x: list[jax.Array], scale: list[jax.Array], epsilon: float) -> list[jax.Array]:
    """RMSNorm of a vector in slices."""
    mean = sum(jnp.sum(part * part) for part in x) / sum(part.size for part in x)
    inverse = jax.lax.rsqrt(mean + epsilon)
    return [part * inverse * weight for part, weight in zip(x, scale, strict=True)]
