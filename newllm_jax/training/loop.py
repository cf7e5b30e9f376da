"""Epochs for any model: updates in pieces of about a second, a NaN guard, validation, early stopping, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.config import RunConfig
from newllm_jax.errors import NumericalError
from newllm_jax.training.history import patience_exhausted
from newllm_jax.training.step import Data, EvalFn, Sums, Totals, TrainState, UpdateFn, batches, epoch_order

if TYPE_CHECKING:  # Orbax takes its time, and a dry run has no use for it
    from newllm_jax.training.checkpoint import Checkpoints

PIECE_SECONDS = 1.0

Entry = dict[str, Any]  # one epoch, as metrics.jsonl and results.json have it


class Observer(Protocol):
    """Who watches a run: a progress bar, log files, trackers."""

    def progress(self, epoch: int, done: int, steps: int, loss: float, tokens_per_second: float) -> None:
        """After every piece: `done` of `steps` updates of `epoch`, and the epoch's mean loss so far."""

    def epoch(self, entry: Entry) -> None:
        """After every epoch, before its checkpoint."""


@dataclass(frozen=True)
class Trainer:
    """The compiled functions of a run, and the schedules that its history reports."""

    updates: UpdateFn
    evaluate: EvalFn
    learning_rate: optax.Schedule
    clip_norm: optax.Schedule | None


def mean_metrics(sums: Sums) -> dict[str, float]:
    """Loss (nats per target), perplexity and accuracy from sums."""
    count = max(int(sums.count), 1)
    loss = float(sums.loss) / count
    return {"loss": loss, "ppl": perplexity(loss), "accuracy": int(sums.hits) / count}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluate(evaluation: EvalFn, params: Any, data: Data, examples: int, batch_size: int) -> dict[str, float]:
    """Loss, perplexity and accuracy over a whole split, every target weighing the same."""
    batch_size = min(batch_size, rows(data))
    order = jnp.asarray(batches(np.arange(examples, dtype=np.int32), batch_size, rows(data)))
    return mean_metrics(jax.device_get(evaluation(params, data, order, -(-examples // batch_size))))


def rows(data: Data) -> int:
    """How many examples there is room for in the arrays of a split."""
    return jax.tree.leaves(data)[0].shape[0]


class Pieces:
    """How many updates one compiled call makes: as many as take about a second, learnt from the calls before."""

    def __init__(self, seconds: float = PIECE_SECONDS) -> None:
        self.seconds = seconds
        self.size = 1

    def learn(self, elapsed: float) -> None:
        """Moves the size toward `seconds`, by a factor of 8 at most: the first call also compiles."""
        self.size = max(1, round(self.size * min(max(self.seconds / max(elapsed, 1e-9), 0.125), 8.0)))


def run_epoch(
    updates: UpdateFn,
    state: TrainState,
    data: Data,
    order: jax.Array,
    steps: int,
    key: jax.Array,
    pieces: Pieces,
    on_piece: Callable[[int, Sums], None],
) -> tuple[TrainState, Totals]:
    """All updates of one epoch: the first `steps` batches of `order`.

    Raises:
      NumericalError: the loss or a gradient is no longer finite; checked after every piece.
    """
    totals, done = Totals.zero(), 0
    while done < steps:
        started, stop = time.monotonic(), min(done + pieces.size, steps)
        state, totals = updates(state, totals, data, order, done, stop, key)
        seen: Totals = jax.device_get(totals)
        if not (np.isfinite(seen.sums.loss) and np.isfinite(seen.grad_norm)):
            raise NumericalError(f"a loss or gradient is not finite in updates {done + 1} to {stop}")
        pieces.learn(time.monotonic() - started)
        done = stop
        on_piece(done, seen.sums)
        if done == steps and state.loss_scale is not None and not seen.sums.count:
            raise NumericalError("the loss of no update is finite")
    return state, totals


def fit(
    trainer: Trainer,
    state: TrainState,
    train: tuple[Data, int],
    validation: tuple[Data, int],
    config: RunConfig,
    checkpoints: Checkpoints,
    observer: Observer,
    history: Sequence[Entry] = (),
    remember: Callable[[], dict[str, Any]] = dict,
) -> tuple[TrainState, list[Entry]]:
    """Trains from where `history` ends to `num_epochs`, or until the patience is exhausted.

    Args:
      train, validation: arrays with a leading axis of examples, and the number of examples. The arrays may have room
        for more: trainings on fewer and fewer examples then share compiled programs.
      history: the entries of the epochs already done, whose state `state` is.
      remember: what else every checkpoint's record holds (JSON), asked for when it is written.

    Returns:
      The last state, and the history with the new entries.

    Raises:
      NumericalError: a loss or gradient that is not finite; the last good checkpoint stays.
      InputError: no room for a checkpoint.
    """
    history, pieces = list(history), Pieces()
    (train_data, examples), (val_data, val_examples) = train, validation
    steps = -(-examples // config.batch_size)
    while len(history) < config.num_epochs and not stopped_early(history, config):
        epoch, started = len(history) + 1, time.monotonic()
        shuffled = epoch_order(config.seed, epoch, examples)
        order = jnp.asarray(batches(shuffled, config.batch_size, rows(train_data)))
        key = jax.random.fold_in(jax.random.key(config.seed), epoch)

        def on_piece(done: int, sums: Sums, epoch: int = epoch, started: float = started) -> None:
            rate = int(sums.count) / (time.monotonic() - started)
            observer.progress(epoch, done, steps, mean_metrics(sums)["loss"], rate)

        skipped_before = _skipped(state)
        try:
            state, totals = run_epoch(trainer.updates, state, train_data, order, steps, key, pieces, on_piece)
            train_seconds = time.monotonic() - started
            validated = evaluate(trainer.evaluate, state.params, val_data, val_examples, config.batch_size)
            if not math.isfinite(validated["loss"]):
                raise NumericalError("the validation loss is not finite")
        except NumericalError as error:
            kept = f"the checkpoint of epoch {len(history)} is kept" if history else "there is no checkpoint yet"
            raise NumericalError(f"epoch {epoch}: {error}; {kept}; try a lower learning_rate") from error
        first_update = (epoch - 1) * steps - skipped_before  # of those that the schedules count
        skipped = _skipped(state) - skipped_before
        entry: Entry = {
            "epoch": epoch,
            "train_loss": mean_metrics(jax.device_get(totals.sums))["loss"],
            "val_loss": validated["loss"],
            "val_ppl": validated["ppl"],
            "val_accuracy": validated["accuracy"],
            "learning_rate": np.asarray(trainer.learning_rate(first_update)).item(),
            "clip_norm": np.asarray(trainer.clip_norm(first_update)).item() if trainer.clip_norm else None,
            "grad_norm": float(totals.grad_norm) / max(steps - skipped, 1),
            "tokens_per_second": int(totals.sums.count) / train_seconds,
            "seconds": time.monotonic() - started,
        }
        if state.loss_scale is not None:
            entry["skipped_updates"] = skipped
        history.append(entry)
        observer.epoch(entry)
        checkpoints.save(epoch, state, {**remember(), "history": history}, entry["val_loss"])
    return state, history


def _skipped(state: TrainState) -> int:
    """The updates skipped since the start of the training: of those with a loss scale only."""
    return 0 if state.loss_scale is None else int(state.loss_scale.skipped)


def stopped_early(history: Sequence[Entry], config: RunConfig) -> bool:
    """Whether the patience was exhausted at or before the end of this history."""
    return patience_exhausted([entry["val_loss"] for entry in history], config.patience, config.minimum_gain)
