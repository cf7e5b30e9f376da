"""Sequences of one length out of texts: overlapping windows of each text, or all texts as one stream, packed or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from newllm_jax.newllm.tokenizer import PAD
from newllm_jax.training.memory import check_memory

IDS_AT_ONCE = 2**20  # of windows that are given together


def window_starts(ids: int, length: int, stride: int) -> range:
    """Where the windows of a text of so many ids begin: whole ones (a tail is dropped), or one of a text that fits."""
    return range(0, max(ids - length, 0) + 1, stride)


def windows(ids: np.ndarray, length: int, stride: int) -> Iterator[np.ndarray]:
    """The windows of a text, some at a time, `[..., length]`; a text that fits is padded with 0."""
    if len(ids) < length:
        yield _padded(ids, length)
        return
    found = sliding_window_view(ids, length)[::stride]
    at_once = max(1, IDS_AT_ONCE // length)
    yield from (found[start : start + at_once] for start in range(0, len(found), at_once))


def packed_count(ids: int, length: int) -> int:
    """How many windows `packed_windows` gives of so many ids."""
    return -(-(ids - 1) // (length - 1))


def packed_windows(stream: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """A stream of ids, given in parts, in windows that overlap by one id, some at a time, `[..., length]`.

    So every id but the first is a target once. The last window is padded with 0.
    """
    parts, size = list[np.ndarray](), 0
    for part in stream:
        parts.append(part)
        size += len(part)
        if size >= IDS_AT_ONCE + length:
            whole, rest = _overlapping(np.concatenate(parts), length)
            yield whole
            parts, size = [rest], len(rest)
    whole, rest = _overlapping(np.concatenate(parts), length)
    if len(whole):
        yield whole
    if len(rest) > 1:  # one alone was the last target
        yield _padded(rest, length)


def _overlapping(ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole windows of some ids, and what begins the window after them."""
    if len(ids) < length:
        return np.empty((0, length), ids.dtype), ids
    found = sliding_window_view(ids, length)[:: length - 1]
    return found, ids[len(found) * (length - 1) :]


def _padded(ids: np.ndarray, length: int) -> np.ndarray:
    row = np.full((1, length), PAD, ids.dtype)
    row[0, : len(ids)] = ids
    return row


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
