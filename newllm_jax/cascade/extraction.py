"""Outputs of the frozen base, and then of each stage, for every token: hidden state, hardness score, loss.

The base reads each chunk once, in strict float32. Its hidden states go to the host piece by piece; each finished piece
is a file of the run directory, so that a stopped extraction continues. Only the hard tokens of one stage are
on the device while it trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from newllm_jax.cascade.hardness import token_scores
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.config import Criterion
from newllm_jax.content import array_sha256, note_damage, read_arrays, write_arrays
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.losses import token_losses
from newllm_jax.training.step import Params

PIECE_BATCHES = 4  # in a file
EXTRACTION = 1  # raised whenever the same base and chunks would give other outputs

Advance = Callable[[int], None]  # told how many more chunks or tokens are done


@dataclass(frozen=True)
class Tokens:
    """Tokens and the outputs of the last model that saw them; NumPy, in order.

    Attributes:
      hidden: `[tokens, H]` float32, the last hidden state after the final norm.
      targets: `[tokens]` int32, the id that comes next.
      scores: `[tokens]` float32, low is hard.
      losses: `[tokens]` float32, cross-entropy in nats.
      hits: `[tokens]` bool, whether the arg-max of the logits is the target.
    """

    hidden: np.ndarray
    targets: np.ndarray
    scores: np.ndarray
    losses: np.ndarray
    hits: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray) -> Tokens:
        """Some of the tokens."""
        return Tokens(*(getattr(self, field.name)[indices] for field in fields(self)))

    @staticmethod
    def join(pieces: list[Tokens]) -> Tokens:
        """Pieces one after the other."""
        return Tokens(*(np.concatenate([getattr(piece, field.name) for piece in pieces]) for field in fields(Tokens)))


@dataclass(frozen=True)
class Pieces:
    """Where the finished pieces of an extraction lie, so that it continues where it stopped.

    Attributes:
      folder: of their files.
      split: of the chunks.
      base: the fingerprint of the base's weights.
    """

    folder: Path
    split: str
    base: str

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
        types = {name: np.float32 for name in ("hidden", "scores", "losses")} | {"targets": np.int32, "hits": np.bool_}
        whole = found.keys() == types.keys() and all(
            array.dtype == types[name] and array.shape[:1] == (count,) and array.ndim == 1 + (name == "hidden")
            for name, array in found.items()
        )
        if whole and np.array_equal(found["targets"], targets):
            return Tokens(**found)
        note_damage(self.file(start))  # the hash is right: it is not damaged, but another's work
        return None

    def write(self, start: int, ids: np.ndarray, criterion: Criterion, piece: Tokens) -> None:
        """Keeps a finished piece. Raises OSError where the disk takes no more."""
        write_arrays(self.file(start), self.key(start, ids, criterion), vars(piece))


def extract(
    base: SmolLM2,
    params: Params,
    chunks: np.ndarray,
    criterion: Criterion,
    pieces: Pieces | None = None,
    advance: Advance = lambda chunks: None,
) -> Tokens:
    """One pass of the frozen base over chunks `[chunks, 129]`: 128 tokens of each.

    Args:
      pieces: where finished pieces are kept, and found again; nothing is kept where None.
      advance: called after each piece with its number of chunks.
    """
    outputs, size = [], PIECE_BATCHES * batch_chunks()
    for start in range(0, len(chunks), size):
        ids = chunks[start : start + size]
        piece = pieces.read(start, ids, criterion) if pieces else None
        if piece is None:
            piece = _extract_piece(base, params, ids, criterion, advance)
            if pieces:
                pieces.write(start, ids, criterion, piece)
        else:
            advance(len(ids))
        outputs.append(piece)
    return Tokens.join(outputs)


def _extract_piece(base: SmolLM2, params: Params, ids: np.ndarray, criterion: Criterion, advance: Advance) -> Tokens:
    size, tokens = batch_chunks(), ids.shape[1] - 1
    starts = range(0, len(ids), size)
    full = np.zeros((len(starts) * size, ids.shape[1]), np.int32)  # one shape: one compiled program, the same bits
    full[: len(ids)] = ids
    # All batches are dispatched before the first is fetched: the device need not wait for the host.
    read = [read_chunks(base, criterion, params, full[start : start + size]) for start in starts]
    batches = []
    for start, states in zip(starts, read, strict=True):
        count = min(size, len(ids) - start)
        batches.append(
            Tokens(*(state.reshape(-1, *state.shape[2:])[: count * tokens] for state in jax.device_get(states)))
        )
        advance(count)
    return Tokens.join(batches)


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
    """The outputs of a stage for tokens: hidden states, scores (against its own input), losses and hits."""
    params, batches, size = jax.device_put(params), [], batch_tokens()
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        hidden, targets = tokens.hidden[part], tokens.targets[part]
        missing = size - len(targets)
        padded = np.pad(hidden, [(0, missing), (0, 0)]), np.pad(targets, (0, missing))
        last, scores, losses, hits = jax.device_get(_read_tokens(stage, criterion, params, *padded))
        kept = slice(len(targets))
        batches.append(Tokens(last[kept], targets, scores[kept], losses[kept], hits[kept]))
        advance(len(targets))
    return Tokens.join(batches) if batches else tokens


@partial(jax.jit, static_argnums=(0, 1))
def _read_tokens(
    stage: Stage, criterion: Criterion, params: Params, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, ...]:
    last, logits = cast(tuple[jax.Array, jax.Array], stage.apply({"params": params}, hidden))
    return last, token_scores(criterion, hidden, last, logits), *token_losses(logits, targets)
