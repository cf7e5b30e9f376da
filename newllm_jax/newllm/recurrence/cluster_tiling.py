"""How `cluster.py` cuts its work, and of how much work it is faster than `gpu.py`."""

from __future__ import annotations

from newllm_jax.newllm.recurrence.cell import CellSpec
from newllm_jax.training.back_end import multiprocessors

ROWS = 64  # of a cluster: those of a tensor core's product
COLUMNS = 64  # of a block: as many bytes in bf16 as a row of swizzled shared memory has
WIDTHS = 256, 512  # of clusters of 4 and of 8 blocks; 16 would need more than the hardware promises
SLOTS = 4  # chunks of weights on their way
DEPTH = 2  # tiles of a chunk
LEAST_WORK = 256 * 512  # texts times columns from which on it is faster than `gpu.py`
SHARE_AT_ONCE = 112 / 132  # blocks by multiprocessors: more do not run at once, in clusters of 8
BARRIERS = 13  # of a block, 8 bytes each


def tiles_of_chunk(blocks: int) -> int:
    """D: of a cluster of so many blocks."""
    return min(DEPTH, blocks)


def shared_bytes(hidden_dim: int, num_layers: int) -> int:
    """The shared memory that a block needs forward, which is more than backward; see `cluster_group.Shared`."""
    blocks, tile = hidden_dim // COLUMNS, 2 * ROWS * COLUMNS  # bytes of bf16
    held, weights = 2 * blocks * tile, SLOTS * tiles_of_chunk(blocks) * 2 * COLUMNS**2
    vectors, row_values = 4 * COLUMNS * (num_layers + 4), 2 * 4 * ROWS
    arrays = held, weights, tile, 2 * tile, vectors, row_values, blocks * row_values
    return sum(-(-array // 1024) * 1024 for array in arrays) + 8 * BARRIERS


def is_faster(spec: CellSpec, batch: int, members: int = 1) -> bool:
    """Whether clusters are faster than `gpu.py` where both compute a cell; `members` as in `scan.forms_for`."""
    blocks = members * -(-batch // ROWS) * (spec.hidden_dim // COLUMNS)
    return members * batch * spec.hidden_dim >= LEAST_WORK and blocks <= SHARE_AT_ONCE * multiprocessors()
