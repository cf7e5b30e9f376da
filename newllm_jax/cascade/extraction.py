"""Outputs of the frozen base, and then of each stage, for every token: hidden state, hardness score, loss.

The base reads each chunk once, in strict float32. Its hidden states go piece by piece into a file of the run directory,
which is memory-mapped, and a file for each finished piece vouches for its part of them, so that a stopped extraction
continues. What hard tokens have and what a stage makes of them are files too: in memory are 13 bytes a token.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from newllm_jax.cascade.hardness import token_scores
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.cascade.states import NUMBER, States, map_states, release, write_all
from newllm_jax.config import Criterion, check
from newllm_jax.content import array_sha256, note_damage, read_arrays, write_arrays
from newllm_jax.files import naming
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.arrays import check_array
from newllm_jax.training.losses import token_losses
from newllm_jax.training.mesh import place_beside
from newllm_jax.training.step import Params

PIECE_BATCHES = 4  # in a file
EXTRACTION = 1  # raised whenever the same base and chunks would give other outputs

Advance = Callable[[int], None]  # told how many more chunks or tokens are done


@dataclass(frozen=True)
class Tokens:
    """Tokens and the outputs of the last model that saw them; NumPy, in order.

    Attributes:
      hidden: `[tokens, H]` float32, the last hidden state after the final norm; in memory, or a memory-mapped file.
      targets: `[tokens]` int32, the id that comes next.
      scores: `[tokens]` float32, low is hard.
      losses: `[tokens]` float32, cross-entropy in nats.
      hits: `[tokens]` bool, whether the arg-max of the logits is the target.
      folder: where hidden states that are made from these are written; None where they are kept in memory.
    """

    hidden: np.ndarray
    targets: np.ndarray
    scores: np.ndarray
    losses: np.ndarray
    hits: np.ndarray
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray) -> Tokens:
        """Some of the tokens. Raises OSError where the disk takes no more."""
        states, size = States(self.hidden.shape[1], self.folder), batch_tokens()
        for start in range(0, len(indices), size):
            states.append(self.hidden[indices[start : start + size]])
            release(self.hidden)
        return Tokens(states.array(), *(getattr(self, name)[indices] for name in SCALARS), folder=self.folder)


SCALARS = {"targets": np.int32, "scores": np.float32, "losses": np.float32, "hits": np.bool_}  # of a token


class TokenWriter:
    """Puts the outputs of a model together, part by part: hidden states into a file or memory, the rest into arrays.

    Attributes:
      states: where the hidden states go; None where they are written elsewhere.
    """

    def __init__(self, tokens: int, states: States | None) -> None:
        self.states, self._done = states, 0
        self._scalars = {name: np.empty(tokens, kind) for name, kind in SCALARS.items()}

    def append(self, part: Tokens) -> None:
        """The next tokens. Raises OSError where the disk takes no more."""
        place = slice(self._done, self._done + len(part))
        for name, array in self._scalars.items():
            array[place] = getattr(part, name)
        self._done = place.stop
        if self.states:
            self.states.append(part.hidden)

    def tokens(self, folder: Path | None, hidden: np.ndarray | None = None) -> Tokens:
        """All of them. `hidden`: their hidden states where those were written elsewhere."""
        if self.states:
            hidden = self.states.array()
        return Tokens(cast(np.ndarray, hidden), **self._scalars, folder=folder)


@dataclass(frozen=True)
class Pieces:
    """Where the finished pieces of an extraction lie, so that it continues where it stopped.

    The hidden states of all pieces are one file. A file for each piece has the rest, and the hash of its hidden states.

    Attributes:
      folder: of the files.
      split: of the chunks.
      base: the fingerprint of the base's weights.
    """

    folder: Path
    split: str
    base: str

    @property
    def states(self) -> Path:
        """The file of the hidden states, `[tokens, H]` float32 and nothing else."""
        return self.folder / f"{self.split}.hidden"

    def file(self, start: int) -> Path:
        """The file of the piece that begins with chunk `start`."""
        return self.folder / f"{self.split}-{start:06d}.arrays"

    def key(self, start: int, ids: np.ndarray, criterion: Criterion) -> list[Any]:
        """All that the outputs for chunks `ids [chunks, 129]` depend on, and their place."""
        return [EXTRACTION, self.base, criterion, self.split, start, array_sha256(ids)]

    def read(self, start: int, ids: np.ndarray, criterion: Criterion) -> Tokens | None:
        """A finished piece; None where there is none or, with a `Note`, a damaged one or one of something else."""
        found = read_arrays(self.file(start), self.key(start, ids, criterion))
        if found is None:
            return None
        count, targets = ids[:, 1:].size, ids[:, 1:].ravel()
        expected = {name: (np.dtype(kind), (count,)) for name, kind in SCALARS.items()}
        expected |= {"hidden_sha256": (np.dtype(np.uint8), (32,)), "width": (np.dtype(np.int32), ())}
        whole = {name: (array.dtype, array.shape) for name, array in found.items()} == expected
        if whole and np.array_equal(found["targets"], targets):
            digest, width = found.pop("hidden_sha256"), int(found.pop("width"))
            hidden = self._read_states(start * (ids.shape[1] - 1), count, width)
            if hidden is not None and array_sha256(hidden) == digest.tobytes().hex():
                return Tokens(hidden, **found)  # type: ignore[arg-type]
        note_damage(self.file(start))  # where the hash is right it is not damaged, but another's work
        return None

    def _read_states(self, row: int, count: int, width: int) -> np.ndarray | None:
        """The hidden states of a piece in memory; None where the file has none there."""
        size = width * NUMBER.itemsize
        try:
            with self.states.open("rb") as file:
                if not 0 < (row + count) * size <= os.fstat(file.fileno()).st_size:
                    return None
                file.seek(row * size)
                return np.frombuffer(file.read(count * size), NUMBER).reshape(count, width)
        except (OSError, ValueError):
            return None

    def write(self, start: int, ids: np.ndarray, criterion: Criterion, piece: Tokens) -> None:
        """Keeps a finished piece. Raises OSError where the disk takes no more."""
        width = piece.hidden.shape[-1]
        with naming(self.states):
            self.folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self.states, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as file:
                file.seek(start * (ids.shape[1] - 1) * width * NUMBER.itemsize)
                write_all(file, piece.hidden)
        digest = np.frombuffer(bytes.fromhex(array_sha256(piece.hidden)), np.uint8)
        scalars = {name: getattr(piece, name) for name in SCALARS}
        arrays = {**scalars, "hidden_sha256": digest, "width": np.int32(width)}
        write_arrays(self.file(start), self.key(start, ids, criterion), arrays)


def extract(
    base: SmolLM2,
    params: Params,
    chunks: np.ndarray,
    criterion: Criterion,
    pieces: Pieces | None = None,
    advance: Advance = lambda chunks: None,
    folder: Path | None = None,
) -> Tokens:
    """One pass of the frozen base over chunks `[chunks, 129]`: 128 tokens of each.

    Args:
      pieces: where finished pieces are kept, and found again; nothing is kept where None.
      advance: called after each piece with its number of chunks.
      folder: where hidden states are written that are not kept; None where they stay in memory.

    Raises:
      InputError: an argument of another type or shape.
      OSError: the disk takes no more.
    """
    check("base", base, "a SmolLM2", isinstance(base, SmolLM2))
    check_array("chunks", chunks, "integers", "chunks", "ids")
    tokens, width, size = chunks[:, 1:].size, base.config.hidden_size, PIECE_BATCHES * batch_chunks()
    writer = TokenWriter(tokens, None if pieces else States(width, folder))
    for start in range(0, len(chunks), size):
        ids = chunks[start : start + size]
        piece = pieces.read(start, ids, criterion) if pieces else None
        if piece is None:
            piece = _extract_piece(base, params, ids, criterion, advance)
            if pieces:
                pieces.write(start, ids, criterion, piece)
        else:
            advance(len(ids))
        writer.append(piece)
    if pieces:
        return writer.tokens(pieces.folder, map_states(pieces.states, tokens, width))
    return writer.tokens(folder)


def _extract_piece(base: SmolLM2, params: Params, ids: np.ndarray, criterion: Criterion, advance: Advance) -> Tokens:
    size, tokens = batch_chunks(), ids.shape[1] - 1
    starts = range(0, len(ids), size)
    full = np.zeros((len(starts) * size, ids.shape[1]), np.int32)  # one shape: one compiled program, the same bits
    full[: len(ids)] = ids
    # All batches are dispatched before the first is fetched: the device need not wait for the host.
    batches = (place_beside(params, full[start : start + size]) for start in starts)
    read = [read_chunks(base, criterion, params, batch) for batch in batches]
    writer = TokenWriter(len(ids) * tokens, States(base.config.hidden_size))
    for start, states in zip(starts, read, strict=True):
        count = min(size, len(ids) - start)
        outputs = (state.reshape(-1, *state.shape[2:])[: count * tokens] for state in jax.device_get(states))
        writer.append(Tokens(*outputs))
        advance(count)
    return writer.tokens(None)


def batch_chunks() -> int:
    """How many chunks the base reads at a time: enough to fill a GPU, few enough for a progress bar on a CPU."""
    return 32 if jax.default_backend() == "gpu" else 8


def batch_tokens() -> int:
    """How many tokens a stage reads at a time."""
    return 128 * batch_chunks()


@partial(jax.jit, static_argnums=(0, 1))
def read_chunks(base: SmolLM2, criterion: Criterion, params: Params, ids: jax.Array) -> tuple[jax.Array, ...]:
    """The outputs of the base for `ids [chunks, 129]`: the fields of `Tokens`, each `[chunks, 128, ...]`."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    states: Any = base.apply({"params": params}, inputs, method="hidden")
    logits: Any = base.apply({"params": params}, states.last, method="logits")
    scores = token_scores(criterion, states.embedding, states.last, logits)
    return states.last, targets, scores, *token_losses(logits, targets)


def run_stage(
    stage: Stage, params: Params, tokens: Tokens, criterion: Criterion, advance: Advance = lambda tokens: None
) -> Tokens:
    """The outputs of a stage for tokens: hidden states, scores (against its own input), losses and hits.

    Raises:
      OSError: the disk takes no more.
    """
    size = batch_tokens()
    writer = TokenWriter(len(tokens), States(tokens.hidden.shape[1], tokens.folder))
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        hidden, targets = tokens.hidden[part], tokens.targets[part]
        missing = size - len(targets)
        padded = np.pad(hidden, [(0, missing), (0, 0)]), np.pad(targets, (0, missing))
        last, scores, losses, hits = jax.device_get(
            _read_tokens(stage, criterion, params, *place_beside(params, padded))
        )
        kept = slice(len(targets))
        writer.append(Tokens(last[kept], targets, scores[kept], losses[kept], hits[kept]))
        release(tokens.hidden)
        advance(len(targets))
    return writer.tokens(tokens.folder)


@partial(jax.jit, static_argnums=(0, 1))
def _read_tokens(
    stage: Stage, criterion: Criterion, params: Params, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, ...]:
    last, logits = cast(tuple[jax.Array, jax.Array], stage.apply({"params": params}, hidden))
    return last, token_scores(criterion, hidden, last, logits), *token_losses(logits, targets)
