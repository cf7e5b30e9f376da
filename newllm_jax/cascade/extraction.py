"""What the frozen base, and then each stage, makes of every token: hidden state, hardness score, loss.

The base reads each chunk once, in strict float32. Its hidden states go to the host piece by piece; each finished piece
is a file of the run directory, so that a stopped extraction goes on where it was. Only the hard tokens of one stage are
on the device while it trains.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.cascade.hardness import token_scores
from newllm_jax.cascade.smollm import SmolLM2
from newllm_jax.cascade.stage import Stage
from newllm_jax.config import Criterion
from newllm_jax.sources.cache import whole_file
from newllm_jax.training.step import Params

BATCH_CHUNKS = 8  # chunks that the base reads at a time
PIECE_CHUNKS = 4 * BATCH_CHUNKS  # chunks in a file
BATCH_TOKENS = 512  # tokens that a stage reads at a time

Advance = Callable[[int], None]  # told how many more chunks or tokens are done


@dataclass(frozen=True)
class Tokens:
    """Tokens and what the last model that saw them made of each; NumPy, in order.

    Attributes:
      hidden: `[tokens, hidden]` float32, the last hidden state after the final norm.
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


def extract(
    base: SmolLM2,
    params: Params,
    chunks: np.ndarray,
    criterion: Criterion,
    folder: Path | None = None,
    name: str = "",
    advance: Advance = lambda chunks: None,
) -> Tokens:
    """One pass of the frozen base over chunks `[chunks, 129]`: 128 tokens of each.

    Args:
      folder, name: where finished pieces are kept, and found again; nothing is kept where None.
      advance: told of each piece.
    """
    pieces = []
    for start in range(0, len(chunks), PIECE_CHUNKS):
        ids = chunks[start : start + PIECE_CHUNKS]
        file = folder / f"{name}-{start:06d}.npz" if folder else None
        piece = _read_piece(file) if file else None
        if piece is None:
            piece = _extract_piece(base, params, ids, criterion, advance)
            if file:
                _write_piece(file, piece)
        else:
            advance(len(ids))
        pieces.append(piece)
    return Tokens.join(pieces)


def _extract_piece(base: SmolLM2, params: Params, ids: np.ndarray, criterion: Criterion, advance: Advance) -> Tokens:
    batches = []
    for start in range(0, len(ids), BATCH_CHUNKS):
        batch = ids[start : start + BATCH_CHUNKS]
        full = np.zeros((BATCH_CHUNKS, ids.shape[1]), np.int32)  # one shape: one compiled program, the same bits
        full[: len(batch)] = batch
        states = jax.device_get(read_chunks(base, criterion, params, full))
        kept = len(batch) * (ids.shape[1] - 1)
        batches.append(Tokens(*(state.reshape(-1, *state.shape[2:])[:kept] for state in states)))
        advance(len(batch))
    return Tokens.join(batches)


@partial(jax.jit, static_argnums=(0, 1))
def read_chunks(base: SmolLM2, criterion: Criterion, params: Params, ids: jax.Array) -> tuple[jax.Array, ...]:
    """What the base makes of `ids [chunks, 129]`: the fields of `Tokens`, each `[chunks, 128, ...]`."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    states: Any = base.apply({"params": params}, inputs, method="hidden")
    logits: Any = base.apply({"params": params}, states.last, method="logits")
    scores = token_scores(criterion, states.embedding, states.last, logits)
    return states.last, targets, scores, *_judge(logits, targets)


def run_stage(
    stage: Stage, params: Params, tokens: Tokens, criterion: Criterion, advance: Advance = lambda tokens: None
) -> Tokens:
    """The tokens as a stage leaves them: its hidden states, scores (against its own input), losses and hits."""
    params, batches = jax.device_put(params), []
    for start in range(0, len(tokens), BATCH_TOKENS):
        part = slice(start, start + BATCH_TOKENS)
        hidden, targets = tokens.hidden[part], tokens.targets[part]
        missing = BATCH_TOKENS - len(targets)
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
    return last, token_scores(criterion, hidden, last, logits), *_judge(logits, targets)


def _judge(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses, jnp.argmax(logits, -1) == targets


def _read_piece(file: Path) -> Tokens | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Tokens(**arrays)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None  # absent or damaged: it is made anew


def _write_piece(file: Path, piece: Tokens) -> None:
    with whole_file(file) as partial_file, partial_file.open("wb") as stream:
        np.savez(stream, **{field.name: getattr(piece, field.name) for field in fields(piece)})
