"""How `token_kernel.py` shares out a model among thread blocks, and which models it can compute; without Pallas."""

from __future__ import annotations

import math

from newllm_jax.smollm.llama_config import LlamaConfig

HEAD = 64  # the size of a head; every width is a multiple of it
CHUNK = 128  # columns of a row that a warp reads at a time, 4 a thread; rows of weights are filled up to whole chunks
SPLITS = 8  # of the positions that a query head sees
MOST_ROWS = 16  # of a matrix that are loaded at a time, at most
LARGEST_SHARE = 192 * 1024  # bytes that a phase has in registers at a time, of 256 KiB that a multiprocessor has


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
    if config.head_dim != HEAD or config.hidden_size % HEAD or config.intermediate_size % HEAD:
        return f"head_dim must be {HEAD}, and hidden_size and intermediate_size multiples of that"
    share = phase_bytes(config, number_bytes, blocks)
    if share > LARGEST_SHARE:
        return f"a thread block's share of a phase, {share} bytes, does not fit into its registers"
    return ""


def phase_bytes(config: LlamaConfig, number_bytes: int, blocks: int) -> int:
    """The bytes that a block has in registers in the phase with most: weights, those of the next phase, and a vector.

    Args:
      number_bytes: of a weight; those of vectors are float32.
    """
    hidden, inner, queries = config.hidden_size, config.intermediate_size, config.num_heads * HEAD
    all_heads = queries + 2 * config.num_kv_heads * HEAD

    def weights(rows: int, columns: int) -> int:
        return math.prod(tile_rows(rows, blocks)) * columns * number_bytes

    def vector(width: int, rows: int) -> int:
        return tile_rows(rows, blocks)[0] * padded(width) * 4  # one for each row of a tile

    query_key_value, output = weights(all_heads, padded(hidden)), weights(hidden, whole_slice(queries))
    gate_up, down = weights(inner, 2 * padded(hidden)), weights(hidden, padded(inner))
    return max(
        output + gate_up + 2 * SPLITS * whole_slice(queries) * 4,  # phase 3, with logarithms and mixes
        gate_up + down + vector(hidden, inner),  # phase 4
        down + query_key_value + vector(inner, hidden),  # phase 5
    )
