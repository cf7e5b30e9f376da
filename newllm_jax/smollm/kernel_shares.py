"""How `token_kernel.py` shares out a model among thread blocks, and which models it can compute; without Pallas."""

from __future__ import annotations

import math

from newllm_jax.smollm.llama_config import LlamaConfig

HEAD = 64  # the size of a head; every width is a multiple of it
CHUNK = 128  # columns of a row that a warp reads at a time, 4 a thread; rows of weights are filled up to whole chunks
MOST_ROWS = 16  # of a matrix that are loaded at a time, at most
LARGEST_SHARE = 96 * 1024  # bytes of a layer that a thread block prefetches into its registers at a time


def padded(width: int) -> int:
    """The columns of whole chunks that hold so many."""
    return -(-width // CHUNK) * CHUNK


def whole_slice(width: int) -> int:
    """The columns of one slice that holds so many: a power of two of chunks."""
    return CHUNK << (-(-width // CHUNK) - 1).bit_length()


def tile_rows(rows: int, blocks: int) -> tuple[int, int]:
    """Of how many rows each of the tiles of a block are, and how many tiles it has, to share out rows among blocks."""
    share = -(-rows // blocks)
    size = min(1 << (share - 1).bit_length(), MOST_ROWS)
    return size, -(-share // size)


def obstacle(config: LlamaConfig, number_bytes: int, blocks: int) -> str:
    """Why the kernel cannot compute a model, whose weights have so many bytes each; "" where it can."""
    hidden, inner = config.hidden_size, config.intermediate_size
    if config.head_dim != HEAD or hidden % HEAD or inner % HEAD:
        return f"head_dim must be {HEAD}, and hidden_size and intermediate_size multiples of that"
    queries, all_heads = config.num_heads * HEAD, (config.num_heads + 2 * config.num_kv_heads) * HEAD
    matrices = (
        (all_heads, padded(hidden)), (hidden, whole_slice(queries)), (inner, 2 * padded(hidden)),
        (hidden, padded(inner)),
    )  # fmt: skip  # rows, and numbers of each
    share = max(math.prod(tile_rows(rows, blocks)) * numbers for rows, numbers in matrices) * number_bytes
    if share > LARGEST_SHARE:
        return f"a thread block's share of a layer, {share} bytes, does not fit into its registers"
    return ""
