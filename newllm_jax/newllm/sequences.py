"""Sequences of one length out of texts: overlapping windows of each text, or all texts as one stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from newllm_jax.newllm.tokenizer import PAD
from newllm_jax.training.memory import check_memory


def window_starts(ids: int, length: int, stride: int) -> range:
    """Where the windows of a text of so many ids begin: whole ones (a tail is dropped), or one of a text that fits."""
    return range(0, max(ids - length, 0) + 1, stride)


def cut(encoded: Sequence[Sequence[int]], length: int, stride: int) -> np.ndarray:
    """The windows of all texts, `[sequences, length]` ids (uint16); a text that fits is padded with 0.

    Raises:
      InputError: there is no memory for them.
    """
    starts = [window_starts(len(ids), length, stride) for ids in encoded]
    shape = sum(map(len, starts)), length
    check_memory({"sequence_length": math.prod(shape) * np.dtype(np.uint16).itemsize}, host=True)
    windows = np.full(shape, PAD, np.uint16)
    pieces = (ids[start : start + length] for ids, of_text in zip(encoded, starts, strict=True) for start in of_text)
    for window, piece in zip(windows, pieces, strict=True):
        window[: len(piece)] = piece
    return windows


def stream_pieces(ids: int, rows: int, length: int) -> int:
    """How many pieces `cut_stream` gives of each row."""
    return -(-_row_targets(ids, rows) // (length - 1))


def cut_stream(stream: np.ndarray, rows: int, length: int) -> np.ndarray:
    """A stream in rows that are read side by side, each in pieces of `length` ids, of which the last is a target only.

    Every id but the first is a target once: the last of a piece is the first of the next one, and the last of a row the
    first of the next row. What is missing at the ends of rows is 0.

    Args:
      stream: ids `[N]`.

    Returns:
      `[pieces * rows, length]` ids (uint16): the first piece of each row, the second of each, and so on.
    """
    targets, pieces = _row_targets(len(stream), rows), stream_pieces(len(stream), rows, length)
    check_memory({"sequence_length": pieces * rows * length * stream.itemsize}, host=True)
    padded = np.full(rows * targets + 1, PAD, stream.dtype)
    padded[: len(stream)] = stream
    each = np.full((rows, pieces * (length - 1) + 1), PAD, stream.dtype)
    each[:, : targets + 1] = [padded[row * targets : (row + 1) * targets + 1] for row in range(rows)]
    starts = range(0, pieces * (length - 1), length - 1)
    return np.concatenate([each[:, start : start + length] for start in starts])


def _row_targets(ids: int, rows: int) -> int:
    return -(-(ids - 1) // rows)
