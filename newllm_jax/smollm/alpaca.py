"""Alpaca rows (Taori et al. 2023) to chunks of token ids, cut as the report of CASCADE cut them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from newllm_jax.config import CascadeConfig, ChunkConfig, check
from newllm_jax.errors import InputError
from newllm_jax.sources.text import open_source

CHUNK = 129  # ids; as input and target one less
STRIDE = CHUNK - 1  # the last id of a chunk is the first of the next
COLUMNS = ("instruction", "input", "output")


class Encoder(Protocol):
    """What turns a text into ids."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class AlpacaChunks:
    """Chunks of ids `[chunks, 129]`, int32: `chunk[:-1]` is the input and `chunk[1:]` the target.

    Attributes:
      train, validation: the chunks of each split.
      provenance: where the rows came from; empty where they were handed over.
    """

    train: np.ndarray
    validation: np.ndarray
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def train_tokens(self) -> int:
        """Predicted tokens of the train split: 128 a chunk."""
        return len(self.train) * STRIDE

    @property
    def validation_tokens(self) -> int:
        """Predicted tokens of the validation split."""
        return len(self.validation) * STRIDE

    @property
    def fingerprint(self) -> str:
        """sha256 of the ids: equal where training would see the same."""
        return hashlib.sha256(self.train.tobytes() + b"|" + self.validation.tobytes()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What `results.json` says about the data."""
        return {
            **self.provenance,
            "train_chunks": len(self.train),
            "validation_chunks": len(self.validation),
            "train_tokens": self.train_tokens,
            "val_tokens": self.validation_tokens,
        }


def load_alpaca(tokenizer: Encoder, config: ChunkConfig | None = None) -> AlpacaChunks:
    """The chunks of a configuration; the built-in text gives as many as it can, in the same proportion.

    Args:
      tokenizer: of the base model, anything with `encode(text) -> ids`.
      config: the published 1,000 and 100 chunks of Alpaca by default.

    Raises:
      InputError: a source that is missing, ambiguous or lacks a column; too few rows (says how many chunks there are).
    """
    check("tokenizer", tokenizer, "an object that encodes texts", callable(getattr(tokenizer, "encode", None)))
    check("config", config, "a CascadeConfig or FinetuneConfig", config is None or isinstance(config, ChunkConfig))
    config = config or CascadeConfig()
    source = open_source(config.dataset, config.dataset_config, config.fallback)
    chunks = chunk_rows(
        source.rows(COLUMNS), tokenizer, config.train_chunks, config.validation_chunks, shrink=source.path is None
    )
    return replace(chunks, provenance=source.provenance())


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
    chunks: list[list[int]] = []
    owners: list[int] = []  # the row of each chunk

    def border(train: int) -> int:
        """Where validation begins after this many train chunks."""
        end = min(train, len(chunks))
        while not split_rows and 0 < end < len(chunks) and owners[end] == owners[end - 1]:
            end += 1
        return end

    for number, row in enumerate(rows):
        pieces = list(row_chunks(tokenizer.encode(row_text(row, number))))
        chunks += pieces
        owners += [number] * len(pieces)
        if len(chunks) >= border(train_chunks) + validation_chunks and len(chunks) > train_chunks:
            break
    wanted = train_chunks + validation_chunks
    found = len(chunks) - max(border(train_chunks) - train_chunks, 0)
    if found < wanted:
        train_chunks, validation_chunks = (found * part // wanted for part in (train_chunks, validation_chunks))
        if not shrink or min(train_chunks, validation_chunks) < 1:
            raise InputError(
                f"dataset: too few rows: they give {found} chunks of {CHUNK} tokens, {wanted} are asked for"
            )
    start = border(train_chunks)
    ids = np.asarray(chunks[: start + validation_chunks], np.int32)
    return AlpacaChunks(ids[:train_chunks], ids[start:])


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
