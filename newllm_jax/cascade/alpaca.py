"""Alpaca rows (Taori et al. 2023) to chunks of token ids, cut as the report of CASCADE cut them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from newllm_jax.errors import InputError

CHUNK = 129  # ids; as input and target one less
STRIDE = CHUNK - 1  # the last id of a chunk is the first of the next
COLUMNS = ("instruction", "input", "output")


class Encoder(Protocol):
    """What turns a text into ids."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class AlpacaChunks:
    """Chunks of ids `[chunks, 129]`, int32: `chunk[:-1]` is the input and `chunk[1:]` the target."""

    train: np.ndarray
    validation: np.ndarray

    @property
    def train_tokens(self) -> int:
        """Predicted tokens of the train split: 128 a chunk."""
        return len(self.train) * STRIDE

    @property
    def validation_tokens(self) -> int:
        """Predicted tokens of the validation split."""
        return len(self.validation) * STRIDE


def chunk_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Encoder,
    train_chunks: int = 1000,
    validation_chunks: int = 100,
    *,
    split_rows: bool = True,
    shrink: bool = False,
) -> AlpacaChunks:
    """The first chunks of the rows for training, the next for validation. Reads no more rows than it needs.

    Args:
      rows: with the text columns `instruction`, `input` and `output`, in order.
      tokenizer: anything with `encode(text) -> ids`.
      train_chunks: how many chunks train.
      validation_chunks: how many of the next validate.
      split_rows: True cuts as published: a row can give the last train and the first validation chunks. False leaves
        out what the border row has beyond the last train chunk, so that validation sees no row of training.
      shrink: with too few rows take what there is, in the same proportion, instead of an error.

    Raises:
      InputError: too few rows (says how many chunks there are), or a row that lacks a column or holds no text in it.
    """
    train, rest = [], []
    for number, row in enumerate(rows):
        pieces = list(row_chunks(tokenizer.encode(row_text(row, number))))
        room = train_chunks - len(train)
        train += pieces[:room]
        if room <= 0 or split_rows:
            rest += pieces[max(room, 0) :]
        if len(rest) >= validation_chunks and len(train) == train_chunks:
            break
    found = len(train) + len(rest)
    if len(train) < train_chunks or len(rest) < validation_chunks:
        wanted = train_chunks + validation_chunks
        train_chunks = found * train_chunks // wanted
        validation_chunks = found * validation_chunks // wanted
        if not shrink or min(train_chunks, validation_chunks) < 1:
            raise InputError(
                f"dataset: too few rows: they give {found} chunks of {CHUNK} tokens, {wanted} are asked for"
            )
        train, rest = (train + rest)[:train_chunks], (train + rest)[train_chunks:]
    return AlpacaChunks(np.asarray(train, np.int32), np.asarray(rest[:validation_chunks], np.int32))


def row_text(row: Mapping[str, Any], number: int) -> str:
    """Instruction, input and output, one under the other. An absent value (None) is empty text."""
    for column in COLUMNS:
        if column not in row:
            raise InputError(f"dataset: row {number} has no column {column!r} (it has {', '.join(row)})")
        if not isinstance(row[column], (str, type(None))):
            raise InputError(f"dataset: column {column!r} of row {number} holds {type(row[column]).__name__}, not text")
    return "\n".join(row[column] or "" for column in COLUMNS)


def row_chunks(ids: list[int]) -> Iterator[list[int]]:
    """A row's chunks of 129 ids; what is left over is dropped, and a row of 128 ids or fewer gives none."""
    for start in range(0, len(ids) - STRIDE, STRIDE):
        yield ids[start : start + CHUNK]
