"""Epochs for any model: updates in pieces of about a second, a NaN guard, validation, early stopping, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.config import Precision, RunConfig
from newllm_jax.errors import InputError, NumericalError
from newllm_jax.training.history import Entry, History, is_finished
from newllm_jax.training.losses import Sums, mean_metrics
from newllm_jax.training.split import Data, Split
from newllm_jax.training.step import EvalFn, Totals, TrainState, UpdateFn

if TYPE_CHECKING:  # Orbax takes time to import, and a dry run does not use it
    from newllm_jax.training.checkpoint import Checkpoints

PIECE_SECONDS = 1.0


class Observer(Protocol):
    """Who watches a run: a progress bar, log files, trackers."""

    def progress(self, epoch: int, done: int, steps: int, loss: float, tokens_per_second: float) -> None:
        """After every piece: `done` of `steps` updates of `epoch`, and the epoch's mean loss so far."""

    def epoch(self, entry: Entry) -> None:
        """After every epoch, before its checkpoint."""


@dataclass(frozen=True)
class Training:
    """The compiled functions of a training, the schedules that its history reports, and its precision."""

    updates: UpdateFn
    evaluate: EvalFn
    learning_rate: optax.Schedule
    clip_norm: optax.Schedule | None
    precision: Precision = "fp32"


def evaluate(evaluation: EvalFn, params: Any, split: Split, batch_size: int) -> dict[str, float]:
    """Loss, perplexity and accuracy over a whole split, every target weighing the same."""
    batch_size = min(batch_size, split.room)
    order = split.in_order(batch_size)
    return mean_metrics(jax.device_get(evaluation(params, split.data, order, split.steps(batch_size))))


class Pieces:
    """How many updates one compiled call makes: as many as take about a second, learnt from the calls before.

    Attributes:
      limit: the most, the updates of an epoch.
      size: how many the next call makes.
    """

    def __init__(self, limit: int, seconds: float = PIECE_SECONDS) -> None:
        self.limit, self.seconds = limit, seconds
        self.size = 1

    def learn(self, elapsed: float) -> None:
        """Moves the size toward `seconds`, by a factor of 8 at most: the first call also compiles."""
        factor = min(max(self.seconds / max(elapsed, 1e-9), 0.125), 8.0)
        self.size = min(max(1, round(self.size * factor)), self.limit)


def run_epoch(
    updates: UpdateFn,
    state: TrainState,
    data: Data,
    order: jax.Array,
    key: jax.Array,
    pieces: Pieces,
    on_piece: Callable[[int, Sums], None],
) -> tuple[TrainState, Totals]:
    """All updates of one epoch: the first `pieces.limit` batches of `order`.

    Raises:
      NumericalError: the loss or a gradient is no longer finite, and of which update; checked after every piece.
    """
    totals, done, steps = Totals.zero(), 0, pieces.limit
    while done < steps:
        started, stop = time.monotonic(), min(done + pieces.size, steps)
        state, totals = updates(state, totals, data, order, done, stop, key)
        seen: Totals = jax.device_get(totals)
        if not (np.isfinite(seen.sums.loss) and np.isfinite(seen.grad_norm)):
            raise NumericalError(f"{_first_not_finite(seen)} of {steps} is not finite")
        pieces.learn(time.monotonic() - started)
        done = stop
        on_piece(done, seen.sums)
        if done == steps and state.loss_scale is not None and not seen.sums.count:
            raise NumericalError("no update had a finite loss")
    return state, totals


def fit(
    training: Training,
    state: TrainState,
    train: Split,
    validation: Split,
    config: RunConfig,
    checkpoints: Checkpoints,
    observer: Observer,
    history: History = (),
    record: Callable[[], dict[str, Any]] = dict,
) -> tuple[TrainState, list[Entry]]:
    """Trains from where `history` ends to `num_epochs`, or until the patience is exhausted.

    Args:
      history: the entries of the epochs that `state` has behind it.
      record: what else the record of every checkpoint holds (JSON), called when it is written.

    Returns:
      The last state, and the history with the new entries; by then all checkpoints are on disk.

    Raises:
      NumericalError: a loss or gradient that is not finite; the last good checkpoint stays.
      InputError: no room for a checkpoint, or a `state` that was restored from a damaged one.
    """
    if history and not _all_finite(state):
        raise InputError(_damaged(checkpoints, len(history)))
    history, steps = list(history), train.steps(config.batch_size)
    pieces = Pieces(steps)
    while not is_finished(history, config):
        epoch, started = len(history) + 1, time.monotonic()
        order = train.shuffled(config.batch_size, config.seed, epoch)
        key = jax.random.fold_in(jax.random.key(config.seed), epoch)

        def on_piece(done: int, sums: Sums, epoch: int = epoch, started: float = started) -> None:
            rate = int(sums.count) / (time.monotonic() - started)
            observer.progress(epoch, done, steps, mean_metrics(sums)["loss"], rate)

        skipped_before = _skipped(state)
        try:
            state, totals = run_epoch(training.updates, state, train.data, order, key, pieces, on_piece)
            train_seconds = time.monotonic() - started
            validated = evaluate(training.evaluate, state.evaluated, validation, config.examples_at_once)
            if not math.isfinite(validated["loss"]):
                raise NumericalError("the validation loss is not finite")
        except NumericalError as error:
            kept = f"the checkpoint of epoch {len(history)} is kept" if history else "there is no checkpoint yet"
            raise NumericalError(f"epoch {epoch}: {error}; {kept}; try a new run with {_remedy(training)}") from error
        first_update = (epoch - 1) * steps - skipped_before  # the schedules count applied updates only
        skipped = _skipped(state) - skipped_before
        entry: Entry = {
            "epoch": epoch,
            "train_loss": mean_metrics(jax.device_get(totals.sums))["loss"],
            "val_loss": validated["loss"],
            "val_ppl": validated["ppl"],
            "val_accuracy": validated["accuracy"],
            "learning_rate": np.asarray(training.learning_rate(first_update)).item(),
            "clip_norm": np.asarray(training.clip_norm(first_update)).item() if training.clip_norm else None,
            "grad_norm": float(totals.grad_norm) / max(steps - skipped, 1),
            "tokens_per_second": int(totals.sums.count) / train_seconds,
            "seconds": time.monotonic() - started,
        }
        if state.loss_scale is not None:
            entry["skipped_updates"] = skipped
        history.append(entry)
        observer.epoch(entry)
        # A copy: the record is written while the next epoch runs, which adds to the history.
        checkpoints.save(epoch, state, {**record(), "history": [*history]}, entry["val_loss"])
    checkpoints.wait()
    return state, history


def _damaged(checkpoints: Checkpoints, epoch: int) -> str:
    return (
        f"{checkpoints.folder}: the checkpoint of epoch {epoch} is damaged: some of its numbers are not finite, which "
        "training never saves; delete it to resume from the one before"
    )


def _first_not_finite(totals: Totals) -> str:
    """Which update had the first loss or gradient that was not finite, and which of the two it was."""
    if totals.finite_gradients < totals.finite_losses:
        return f"the gradient of update {totals.finite_gradients + 1}"
    return f"the loss of update {totals.finite_losses + 1}"


def _remedy(training: Training) -> str:
    """The settings that can keep numbers finite."""
    settings = ["a lower learning_rate"]
    settings += ["lower clip_norms"] if training.clip_norm else []
    settings += ["precision fp32"] if training.precision != "fp32" else []
    return " or ".join(settings)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite: bool."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _skipped(state: TrainState) -> int:
    """The updates skipped since the start of the training; 0 without a loss scale."""
    return 0 if state.loss_scale is None else int(state.loss_scale.skipped)
