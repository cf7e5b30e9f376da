"""Epochs for any model: updates in pieces of about a second, a NaN guard, validation, early stopping, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.config import Precision, RunConfig
from newllm_jax.errors import InputError, NumericalError, Stopped
from newllm_jax.processes import agree
from newllm_jax.training.feed import Feed, evaluate_in_blocks, open_feed
from newllm_jax.training.history import Entry, History, is_finished
from newllm_jax.training.losses import mean_metrics
from newllm_jax.training.mesh import ONE_DEVICE, DeviceMesh
from newllm_jax.training.place import Place
from newllm_jax.training.profile import UPDATES, Profile
from newllm_jax.training.split import Split
from newllm_jax.training.step import EvalFn, Totals, TrainState, UpdateFn
from newllm_jax.training.stopping import Stopping

if TYPE_CHECKING:  # Orbax takes time to import, and a dry run does not use it
    from newllm_jax.training.checkpoint import Checkpoints

PIECE_SECONDS = 1.0
PROFILE = "profile"  # the folder of a run's traces


class Observer(Protocol):
    """Who watches a run: a progress bar, log files, trackers."""

    def progress(self, epoch: int, done: int, steps: int, loss: float, tokens_per_second: float) -> None:
        """After every piece: `done` of `steps` updates of `epoch`, and the epoch's mean loss so far."""

    def epoch(self, entry: Entry) -> None:
        """After every epoch, before its checkpoint."""

    def profiled(self, folder: str, updates: int) -> None:
        """When the folder has a trace of some updates."""


@dataclass(frozen=True)
class Training:
    """The compiled functions of a training, the schedules that its history reports, its precision, its devices."""

    updates: UpdateFn
    evaluate: EvalFn
    learning_rate: optax.Schedule
    clip_norm: optax.Schedule | None
    precision: Precision = "fp32"
    mesh: DeviceMesh = ONE_DEVICE


def evaluate(
    evaluation: EvalFn, params: Any, split: Split, batch_size: int, mesh: DeviceMesh = ONE_DEVICE
) -> dict[str, float]:
    """Loss, perplexity and accuracy over a whole split, every target weighing the same.

    Args:
      mesh: for which the evaluation was compiled.
    """
    batch_size = mesh.round_up(min(batch_size, split.room))
    if split.in_files:
        return mean_metrics(jax.device_get(evaluate_in_blocks(evaluation, params, split, batch_size, mesh)))
    order = split.in_order(batch_size)
    return mean_metrics(jax.device_get(evaluation(params, split.data, order, split.steps(batch_size), split.carry)))


class Pieces:
    """How many updates one compiled call makes: as many as take about a second, learnt from the calls before.

    Attributes:
      limit: the most, the updates of an epoch.
      size: how many the next call makes.
      elapsed: seconds that the last call took.
    """

    def __init__(self, limit: int, seconds: float = PIECE_SECONDS) -> None:
        self.limit, self.seconds = limit, seconds
        self.size, self.elapsed = 1, 0.0

    def learn(self, elapsed: float, made: int | None = None) -> None:
        """Moves the size toward `seconds`, by a factor of 8 at most: the first call also compiles.

        Args:
          made: how many updates the call made; None: `size`.
        """
        self.elapsed = elapsed
        factor = (made or self.size) / self.size * self.seconds / max(elapsed, 1e-9)
        self.size = agree(min(max(1, round(self.size * min(max(factor, 0.125), 8.0))), self.limit))


def run_epoch(
    updates: UpdateFn, place: Place, feed: Feed, key: jax.Array, pieces: Pieces, profile: Profile | None = None
) -> Iterator[Place]:
    """The updates of an epoch from `place` on: the first `pieces.limit` batches of `feed`.

    Args:
      profile: traces one of the calls.

    Returns:
      Where the epoch stands after each piece. The state of the place before is gone by then.

    Raises:
      NumericalError: the loss or a gradient is no longer finite, and of which update; checked after every piece.
    """
    begun = time.monotonic() - place.seconds
    while place.done < pieces.limit:
        size = UPDATES if profile and profile.is_next else pieces.size
        started, stop = time.monotonic(), min(place.done + size, feed.border(place.done), pieces.limit)
        data, order = feed.block(place.done)
        with profile.call(stop - place.done) if profile else nullcontext():
            state, totals = updates(place.state, place.totals, data, order, place.done, stop, key)
            seen: Totals = jax.device_get(totals)
        if not (np.isfinite(seen.sums.loss) and np.isfinite(seen.grad_norm)):
            raise NumericalError(f"{_first_not_finite(seen)} of {pieces.limit} is not finite")
        pieces.learn(time.monotonic() - started, stop - place.done)
        place = dataclasses.replace(place, done=stop, state=state, totals=totals, seconds=time.monotonic() - begun)
        yield place
    if place.state.loss_scale is not None and not place.totals.sums.count:
        raise NumericalError("no update had a finite loss")


def fit(
    training: Training,
    state: TrainState,
    splits: Mapping[str, Split],
    config: RunConfig,
    checkpoints: Checkpoints,
    observer: Observer,
    stopping: Stopping,
    history: History = (),
    record: Mapping[str, Any] = {},
) -> tuple[TrainState, list[Entry]]:
    """Trains from where `history` ends to `num_epochs`, or until the patience is exhausted.

    Args:
      splits: `train` and `validation`.
      history: the entries of the epochs that `state` has behind it.
      record: what the record of every checkpoint holds (JSON) beside the history and the seconds of the run.

    Returns:
      The last state, and the history with the new entries; by then all checkpoints are on disk.

    Raises:
      NumericalError: a loss or gradient that is not finite; the last good checkpoint stays.
      InputError: no room for a checkpoint, or a `state` that was restored from a damaged one.
      Stopped: after a piece or an epoch, as `stopping` says; the checkpoints of the epochs by then become whole.
    """
    if (history or checkpoints.is_within_epoch) and not _all_finite(state):
        raise InputError(_damaged(checkpoints, len(history)))
    mesh = training.mesh
    train, validation = (splits[name].placed(mesh) for name in ("train", "validation"))
    history, steps = list(history), train.steps(config.batch_size)
    pieces, profile = Pieces(steps), Profile(stopping.run / PROFILE) if config.profile else None
    while not is_finished(history, config):
        epoch = len(history) + 1
        stopping.check("piece" if config.save_minutes else "epoch", "checkpoint", "mirror")
        key = jax.random.fold_in(jax.random.key(config.seed), epoch)
        place = start = checkpoints.place(epoch, state)
        try:
            with open_feed(train, config.batch_size, config.seed, epoch, start.done, mesh) as feed:
                for place in run_epoch(training.updates, start, feed, key, pieces, profile):
                    sums = jax.device_get(place.totals.sums)
                    rate = int(sums.count) / place.seconds
                    observer.progress(epoch, place.done, steps, mean_metrics(sums)["loss"], rate)
                    stopping.took("piece", pieces.elapsed)
                    if profile and profile.updates:
                        observer.profiled(str(profile.folder), profile.updates)
                        profile = None
                    _pause(place, steps, config, checkpoints, stopping, history, record)
            with stopping.timed("validation"):
                started = time.monotonic()
                validated = evaluate(
                    training.evaluate, place.state.evaluated, validation, config.examples_at_once, mesh
                )
            if not math.isfinite(validated["loss"]):
                raise NumericalError("the validation loss is not finite")
        except NumericalError as error:
            kept = f"the checkpoint of epoch {len(history)} is kept" if history else "there is no checkpoint yet"
            raise NumericalError(f"epoch {epoch}: {error}; {kept}; try a new run with {_remedy(training)}") from error
        state = place.state
        history.append(epoch_entry(training, place, steps, validated, place.seconds + time.monotonic() - started))
        stopping.took("epoch", history[-1]["seconds"])
        observer.epoch(history[-1])
        with stopping.timed("checkpoint"):
            checkpoints.save(epoch, state, history, {**record, "seconds": stopping.clock.seconds()})
            if config.time_limit:  # to know how long it takes until it is whole
                checkpoints.wait()
    checkpoints.wait()
    return state, history


def _pause(
    place: Place,
    steps: int,
    config: RunConfig,
    checkpoints: Checkpoints,
    stopping: Stopping,
    history: History,
    record: Mapping[str, Any],
) -> None:
    """Between two pieces: saves where it is time to, and stops where it has to."""
    minutes = config.save_minutes
    parts = ("validation",) if place.done == steps else ("piece",) if minutes else ("piece", "validation")
    reason = stopping.reason(*parts, "checkpoint", "mirror")
    if minutes and (reason or agree(checkpoints.seconds_since_save >= 60 * minutes)):
        with stopping.timed("checkpoint"):
            checkpoints.save_within_epoch(place, history, {**record, "seconds": stopping.clock.seconds()})
    if reason:
        raise Stopped(reason)


def epoch_entry(training: Training, place: Place, steps: int, validated: Mapping[str, float], seconds: float) -> Entry:
    """A whole epoch, as the history has it. `seconds`: with its validation."""
    first_update = (place.epoch - 1) * steps - place.skipped_before  # the schedules count applied updates only
    totals: Totals = jax.device_get(place.totals)
    entry: Entry = {
        "epoch": place.epoch,
        "train_loss": mean_metrics(totals.sums)["loss"],
        "val_loss": validated["loss"],
        "val_ppl": validated["ppl"],
        "val_accuracy": validated["accuracy"],
        "learning_rate": np.asarray(training.learning_rate(first_update)).item(),
        "clip_norm": np.asarray(training.clip_norm(first_update)).item() if training.clip_norm else None,
        "grad_norm": float(totals.grad_norm) / max(steps - place.skipped, 1),
        "tokens_per_second": int(totals.sums.count) / place.seconds,
        "seconds": seconds,
    }
    if place.state.loss_scale is not None:
        entry["skipped_updates"] = place.skipped
    return entry


def _damaged(checkpoints: Checkpoints, epoch: int) -> str:
    which = f"within epoch {epoch + 1}" if checkpoints.is_within_epoch else f"of epoch {epoch}"
    return (
        f"{checkpoints.folder}: the checkpoint {which} is damaged: some of its numbers are not finite, which training "
        "never saves; delete it to resume from the one before"
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
