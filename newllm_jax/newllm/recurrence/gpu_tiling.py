"""How the GPU kernels of the time loop divide their work among thread blocks; without Pallas."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from newllm_jax.training.back_end import multiprocessors, shared_memory

SMALLEST_GROUP = 16  # thread blocks that wait for each other, and so must run at the same time
MOST_BLOCKS = 32  # in a group
SMALLEST_ROWS = SMALLEST_DEPTH = 16  # that the tensor cores multiply


class Tiling(NamedTuple):
    """How the work is divided among thread blocks.

    Attributes:
      rows: rows of the batch in a group; `blocks` divides them, or they divide `blocks`.
      blocks: thread blocks in a group; each computes 1 / blocks of the columns.
      depth: columns of a product's inner dimension that are loaded at a time, at most.
      warps: of a thread block.
      stages: tiles in flight from device memory: the depth of the software pipeline.
    """

    rows: int
    blocks: int
    depth: int
    warps: int
    stages: int


def tiling_for(batch: int, storage: Any, widths: tuple[int, int], members: int = 1) -> Tiling:
    """The fastest tiling, or a smaller one where the shared memory of the default device has no room for it.

    Args:
      storage: the type in which activations are stored.
      widths: `hidden_dim` and `context_dim`.
      members: of several in one launch, whose batches are filled up to whole groups of `tiling_for(batch, ...)`.
    """
    tiling = _fastest_tiling(batch, storage, widths, members)
    while shared_bytes(tiling, storage, widths) > shared_memory():
        if tiling.depth > SMALLEST_DEPTH:
            tiling = tiling._replace(depth=tiling.depth // 2)
        elif tiling.rows > SMALLEST_ROWS:
            tiling = tiling._replace(rows=tiling.rows // 2)
        else:
            break  # an obstacle of the kernels
    return tiling


def _fastest_tiling(batch: int, storage: Any, widths: tuple[int, int], members: int) -> Tiling:
    """Chosen by measuring on an H200, for cards that 128 blocks fill; rows of 128 on an H100.

    Where the card has room for them, groups have more blocks of a small batch: otherwise half of the multiprocessors
    are idle, and the others take long to load their columns.
    """
    half, power_of_two = storage == jnp.bfloat16, 1 << (members * batch - 1).bit_length()
    few = power_of_two <= 64 and min(widths) >= MOST_BLOCKS * smallest_share() and max(widths) < 1024
    wide = batch <= 64 and min(widths) >= 1024
    blocks = MOST_BLOCKS if (few or wide) and multiprocessors() >= 128 else SMALLEST_GROUP
    rows = min(max(power_of_two * blocks // 128, SMALLEST_ROWS), 128 if members > 1 and half else 64)
    while members > 1 and batch % rows:
        rows //= 2
    if rows == 128:
        return Tiling(rows, blocks, depth=64, warps=8, stages=4)
    if blocks == MOST_BLOCKS and few:
        return Tiling(rows, blocks, depth=128 if half else 64, warps=2, stages=4 if half else 3)
    deep = half and (blocks == MOST_BLOCKS or rows == 64)
    return Tiling(rows, blocks, depth=128 if half and not deep else 64, warps=4, stages=5 if deep else 3)


def smallest_share() -> int:
    """Columns of a matrix that this JAX multiplies on a tensor core, at least."""
    return 8 if jax.__version_info__ >= (0, 9, 2) else 16


def shared_bytes(tiling: Tiling, storage: Any, widths: tuple[int, int]) -> int:
    """The shared memory that Triton takes for the kernels, or a little more: for tiles of the operands.

    Those are as many of each as are on their way, `stages - 1`. Hopper multiplies 64 rows or more while the next tiles
    arrive, so there is one more; other cards are taken for Hopper. The gates have three matrices; the first layer reads
    contexts and their LayerNorm in float32, and rounds a tile to what is stored.

    Args:
      widths: `hidden_dim` and `context_dim`.
    """
    number, buffers = jnp.dtype(storage).itemsize, tiling.stages if tiling.rows >= 64 else tiling.stages - 1
    hidden, context = (width // tiling.blocks for width in widths)
    gates = buffers * number * (tiling.rows + 3 * context)
    first = buffers * (4 * tiling.rows + 8 + number * hidden) + number * tiling.rows
    return tiling.depth * max(gates, first)
