"""How `cluster.py` cuts its work, and of how much work it is faster than `gpu.py`."""

from __future__ import annotations

from newllm_jax.newllm.recurrence.cell import CellSpec

ROWS = 64  # of a cluster: those of a tensor core's product
COLUMNS = 64  # of a block: as many bytes in bf16 as a row of swizzled shared memory has
WIDTHS = 256, 512  # of clusters of 4 and of 8 blocks; 16 would need more than the hardware promises
SLOTS = 4  # chunks of weights on their way
DEPTH = 2  # tiles of a chunk
FASTER = range(32, 113)  # blocks with which it is faster than `gpu.py`; more do not run at once, in clusters of 8


def tiles_of_chunk(blocks: int) -> int:
    """D: of a cluster of so many blocks."""
    return min(DEPTH, blocks)


def is_faster(spec: CellSpec, batch: int, members: int = 1) -> bool:
    """Whether clusters are faster than `gpu.py` where both compute a cell; `members` as in `scan.forms_for`."""
    return members * -(-batch // ROWS) * (spec.hidden_dim // COLUMNS) in FASTER
