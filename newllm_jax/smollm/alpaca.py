"""Alpaca rows (Taori et al. 2023) to chunks of token ids, cut as the report of CASCADE cut them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from newllm_jax.bars import progress_bar
from newllm_jax.config import CascadeConfig, ChunkConfig, check
from newllm_jax.errors import InputError
from newllm_jax.sources.text import open_source

CHUNK = 129  # ids; as input and target one less
STRIDE = CHUNK - 1  # the last id of a chunk is the first of the next
COLUMNS = ("instruction", "input", "output")
SPLITS = ("train", "validation", "test", "calibration")  # in the order of their rows


class Encoder(Protocol):
    """What turns a text into ids."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class AlpacaChunks:
    """Chunks of ids `[chunks, 129]`, int32: `chunk[:-1]` is the input and `chunk[1:]` the target.

    Attributes:
      train, validation: the chunks of each split.
      test, calibration: the chunks after those, `[0, 129]` where the configuration asks for none.
      provenance: where the rows came from; empty where they were handed over.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray = field(default_factory=lambda: np.zeros((0, CHUNK), np.int32))
    calibration: np.ndarray = field(default_factory=lambda: np.zeros((0, CHUNK), np.int32))
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, np.ndarray]:
        """The splits that have chunks, by name, in the order of their rows."""
        named = {name: getattr(self, name) for name in SPLITS}
        return {name: chunks for name, chunks in named.items() if len(chunks)}

    @property
    def threshold_chunks(self) -> np.ndarray:
        """The chunks that thresholds are set on: those for calibration, or without any those of training."""
        return self.calibration if len(self.calibration) else self.train

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
        return hashlib.sha256(b"|".join(chunks.tobytes() for chunks in self.splits.values())).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What `results.json` says about the data."""
        return {
            **self.provenance,
            "train_chunks": len(self.train),
            "validation_chunks": len(self.validation),
            "train_tokens": self.train_tokens,
            "val_tokens": self.validation_tokens,
            **{f"{name}_chunks": len(chunks) for name, chunks in self.splits.items() if name in SPLITS[2:]},
        }


def load_alpaca(tokenizer: Encoder, config: ChunkConfig | None = None) -> AlpacaChunks:
    """The chunks of a configuration; the built-in text gives as many as it can, in the same proportion.

    Args:
      tokenizer: of the base model, anything with `encode(text) -> ids`.
      config: the published 1,000 and 100 chunks of Alpaca by default.

    Raises:
      InputError: a source that is missing, ambiguous or lacks a column; too few rows (says how many chunks there are).

    >>> from newllm_jax import FinetuneConfig, load_smollm2
    >>> config = FinetuneConfig(dataset="rows.jsonl", base_model="base", train_chunks=8, validation_chunks=3)
    >>> chunks = load_alpaca(load_smollm2(config.base_model).tokenizer, config)
    >>> chunks.train.shape, chunks.validation.shape  # a token of each is only predicted
    ((8, 129), (3, 129))
    """
    check("tokenizer", tokenizer, "an object that encodes texts", callable(getattr(tokenizer, "encode", None)))
    check("config", config, "a CascadeConfig or FinetuneConfig", config is None or isinstance(config, ChunkConfig))
    config = config or CascadeConfig()
    with progress_bar("data", 0):
        source = open_source(config.dataset, config.dataset_config, config.fallback)
    wanted = tuple(getattr(config, f"{name}_chunks") for name in SPLITS)
    rows, options = source.rows(COLUMNS), {"split_rows": not config.whole_rows, "shrink": source.path is None}
    with progress_bar("data: chunks", sum(filter(None, wanted)) if wanted[0] else 0) as advance:
        chunks = chunk_rows(rows, tokenizer, wanted, **options, advance=advance)
    return replace(chunks, provenance=source.provenance())


def chunk_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Encoder,
    wanted: Sequence[int | None] = (1000, 100),
    *,
    split_rows: bool = True,
    shrink: bool = False,
    advance: Callable[[int], None] = lambda chunks: None,
) -> AlpacaChunks:
    """The first chunks of the rows for training, the next for validation, and so on. Reads no more rows than it needs.

    In memory are the ids of the chunks, 4 bytes each, and one row.

    Args:
      rows: with the text columns `instruction`, `input` and `output`, in order.
      tokenizer: anything with `encode(text) -> ids`.
      wanted: how many chunks each of `SPLITS` has; those not named have none. None as the first of them is as many as
        there are but for those of the other splits, which are then the last ones.
      split_rows: True cuts as published: a row can give the last chunks of a split and the first of the next. False
        leaves out what a border row has beyond the last chunk of its split, so that no two splits share a row.
      shrink: with too few rows take what there is, in the same proportion, instead of an error.
      advance: called after each row with the number of its chunks.

    Raises:
      InputError: too few rows (says how many chunks there are), or a row that lacks a column or holds no text in it.
    """
    ids, owners = array("i"), array("q")  # one after the other; the row of each chunk

    def places(sizes: Sequence[int]) -> list[range]:
        """Where the chunks of each split are, of which the last may not be there yet."""
        found, start = list[range](), 0
        for size in sizes:
            found.append(range(start, start + size))
            start += size
            while not split_rows and size and 0 < start < len(owners) and owners[start] == owners[start - 1]:
                start += 1
        return found

    train, others = wanted[0], [size or 0 for size in wanted[1:]]
    sizes = [1 if train is None else train, *others]
    for number, row in enumerate(rows):
        before = len(owners)
        for chunk in row_chunks(tokenizer.encode(row_text(row, number))):
            ids.extend(chunk)
            owners.append(number)
        advance(len(owners) - before)
        if train is not None and len(owners) >= places(sizes)[-1].stop:
            break
    asked = found = sum(sizes)
    if train is None:
        sizes[0] = max(1, len(owners) - sum(others))
        while sizes[0] > 1 and places(sizes)[-1].stop > len(owners):  # where rows are whole, borders take some chunks
            sizes[0] -= 1
    whole = tuple(sizes)
    while (missing := places(sizes)[-1].stop - len(owners)) > 0:
        found -= missing
        sizes = [max(found, 0) * part // asked for part in whole]
        if train is None or not shrink or min(sizes[:2]) < 1:
            raise InputError(
                f"dataset: too few rows: they give {found} chunks of {CHUNK} tokens, {asked} are asked for"
            )
    chunks = (np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32)).reshape(-1, CHUNK)
    named = zip(SPLITS, places(sizes), strict=False)
    return AlpacaChunks(**{name: chunks[place.start : place.stop] for name, place in named})  # type: ignore[arg-type]


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
