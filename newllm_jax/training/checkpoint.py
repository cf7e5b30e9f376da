"""Checkpoints with Orbax: every few epochs, the best and the latest two, written while the next epoch runs.

What is read is what was written: `checkpoint_folder` sees to that.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias

import orbax.checkpoint as ocp

from newllm_jax.config import RunConfig
from newllm_jax.errors import InputError, Note, disk_fault
from newllm_jax.processes import by_first
from newllm_jax.training.checkpoint_folder import (
    check_room,
    contents,
    delete,
    epoch_folder,
    epochs_in,
    read_evaluated,
    read_record,
    read_trees,
    remove_leftovers,
    state_trees,
)
from newllm_jax.training.clock import Clock
from newllm_jax.training.history import Entry, History, best_epoch
from newllm_jax.training.manifest import Damaged, Owner, manifest
from newllm_jax.training.place import Place
from newllm_jax.training.step import Params, TrainState
from newllm_jax.training.within_epoch import WithinEpoch

Keep: TypeAlias = Callable[[Sequence[int], History], Collection[int]]  # (epochs with a checkpoint, rising; history)


def every_few_epochs(every: int, first: bool = False) -> Keep:
    """Which checkpoints stay: every few epochs, the best, and the latest two, one of which may be damaged.

    Args:
      first: whether that of the first epoch stays too.
    """

    def choose_epochs(epochs: Sequence[int], history: History) -> set[int]:
        kept = {*(epoch for epoch in epochs if epoch % every == 0), *epochs[-2:], best_epoch(history)}
        return kept | {*epochs[:1]} if first else kept

    return choose_epochs


@dataclass(frozen=True)
class Checkpoint:
    """What one holds: the state after `epoch`, and the record (JSON: history, seconds).

    `is_verified`: whether it has a manifest; those of version 0.1.0 have none.
    """

    epoch: int
    state: TrainState
    record: dict[str, Any]
    is_verified: bool


class Checkpoints:
    """The checkpoints of one training. Use it as a context: leaving waits for what is being written.

    A checkpoint is a folder `epoch_N`. It has its name when it is whole, and loses it before it is deleted.
    """

    def __init__(self, folder: Path, owner: Owner, keep: Keep | None = None) -> None:
        """`keep`: which checkpoints stay; all of them where None."""
        self.folder, self._owner, self._keep = folder.absolute(), owner, keep
        self._history: History = ()
        self._place: Place | None = None
        self._saved = time.monotonic()
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        by_first(self._tidy)
        self._within_epoch = WithinEpoch(self.folder, owner)

    def _tidy(self) -> None:
        """Makes the folder, or removes what a killed process left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self._checkpointer.close()

    @property
    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, rising."""
        return epochs_in(self.folder)

    def save(self, epoch: int, state: TrainState, history: History, record: Mapping[str, Any] | None = None) -> None:
        """Starts writing; returns once the arrays are copied and hashed.

        Args:
          record: what else the checkpoint holds (JSON).

        Raises:
          InputError: the disk has no room (nothing that is already there is harmed).
        """
        self.wait()
        check_room(self.folder, state, f"of epoch {epoch}")
        trees = state_trees(state)
        content = manifest(self._owner, epoch, trees, {**(record or {}), "history": [*history]})
        self._history = [*history]
        with self._writing():
            self._checkpointer.save(self._path(epoch), contents(content, trees))
        self._saved = time.monotonic()

    @property
    def is_within_epoch(self) -> bool:
        """Whether what was resumed is a place within the epoch that comes next."""
        return self._place is not None

    @property
    def seconds_since_save(self) -> float:
        """How long ago the last checkpoint was saved, or these were opened."""
        return time.monotonic() - self._saved

    def wait(self) -> None:
        """Returns when everything is on the disk and no more than what is to stay.

        Raises:
          InputError: the disk has no room.
        """
        with self._writing():
            self._checkpointer.wait_until_finished()
            by_first(self._drop)

    def _drop(self) -> None:
        """Deletes what is not to stay."""
        if self._keep and self._history:
            self._delete(set(self.epochs) - set(self._keep(self.epochs, self._history)))
        self._within_epoch.drop(max(self.epochs, default=0))

    def _delete(self, epochs: Iterable[int]) -> None:
        for epoch in epochs:
            delete(self._path(epoch))

    def save_within_epoch(self, place: Place, history: History, record: Mapping[str, Any]) -> None:
        """Saves a place in an epoch, until the epoch's own checkpoint is whole; returns when it is on the disk.

        Args:
          record: what else the checkpoint holds (JSON).

        Raises:
          InputError: the disk has no room.
        """
        with self._writing():
            self._within_epoch.save(place, history, record)
        self._saved = time.monotonic()

    def place(self, epoch: int, state: TrainState) -> Place:
        """Where an epoch goes on that was stopped within; its start where it was not."""
        found, self._place = self._place, None
        return found if found and found.epoch == epoch else Place.start(epoch, state)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the errors of a full or read-only disk, which Orbax raises while the next epoch runs, into one line."""
        try:
            yield
        except Exception as error:
            fault = disk_fault(error)
            if fault is None:
                raise
            whole = f"the checkpoints up to epoch {max(self.epochs)} are whole" if self.epochs else "no checkpoint yet"
            raise InputError(f"{self.folder}: {fault}; {whole}; make room and resume") from error

    def latest(
        self, like: TrainState, needed: Callable[[History], int] = best_epoch
    ) -> tuple[Checkpoint | None, dict[int, str]]:
        """The latest checkpoint that is whole, on the default device, and what is wrong with later ones, by epoch.

        Args:
          like: a state of the same shapes; its values are not used.
          needed: the epoch whose parameters are read in the end: a checkpoint without them is of no use.

        Raises:
          InputError: there are checkpoints, and none of them is whole.
        """
        damaged: dict[int, str] = {}
        for epoch in reversed(self.epochs):
            try:
                trees, record, is_verified = read_trees(self._path(epoch), self._owner, epoch, state_trees(like))
                self._check_chosen(needed(record["history"]), epoch, like.params)
                return Checkpoint(epoch, dataclasses.replace(like, **trees), record, is_verified), damaged
            except Damaged as fault:
                damaged[epoch] = str(fault)
        if damaged:
            again = "a new run of the same settings begins again"
            raise InputError(f"{self.folder}: none of the checkpoints can be used: {_listed(damaged)}; {again}")
        return None, {}

    def resume(
        self,
        state: TrainState,
        config: RunConfig,
        clock: Clock,
        narrate: Callable[[str], None],
        needed: Callable[[History], int] = best_epoch,
    ) -> tuple[TrainState, list[Entry]]:
        """State and history after the latest checkpoint that is whole, or within the epoch that follows.

        Later ones are deleted: they are damaged, or their best one is, and the resumed run fills their places.

        Args:
          state: the initial state, returned with no history where there is no checkpoint.
          clock: counts the seconds that the run took up to then.
          narrate: receives the lines that tell what was found.
          needed: as in `latest`.

        Raises:
          InputError: none of the checkpoints is whole, or there are more epochs than `num_epochs`.
        """
        of_part = f"{self._owner.part.replace('_', ' ')}, " if self._owner.part else ""
        if within := self._resume_within_epoch(state, needed):
            self._place, record = within
            clock.resume(record["seconds"])
            narrate(f"{of_part}continuing within epoch {self._place.epoch}, after update {self._place.done}")
            return self._place.state, record["history"]
        found, damaged = self.latest(state, needed)
        if damaged:
            narrate(f"{of_part}damaged checkpoints, skipped: {_listed(damaged)}")
        if found is None:
            return state, []
        if found.epoch > config.num_epochs:
            raise InputError(
                f"num_epochs: {of_part}{self.folder} has {found.epoch} epochs already, not {config.num_epochs}"
            )
        if not found.is_verified:
            narrate(f"note        {of_part}the checkpoint of epoch {found.epoch} is from before checkpoints had "
                    "manifests: damage to its numbers cannot be noticed")  # fmt: skip
        latest = found.epoch

        def drop_the_rest() -> None:
            self._within_epoch.drop(latest)  # of a process that was killed before it did
            self._delete(epoch for epoch in self.epochs if epoch > latest)  # the resumed run fills their places

        by_first(drop_the_rest)
        clock.resume(found.record["seconds"])
        narrate(f"{of_part}continuing after epoch {found.epoch}")
        self._history = found.record["history"]
        return found.state, [*found.record["history"]]

    def _resume_within_epoch(
        self, like: TrainState, needed: Callable[[History], int]
    ) -> tuple[Place, dict[str, Any]] | None:
        """The place within the epoch after the last one, and its record; None where there is none that is whole."""
        epoch = max(self.epochs, default=0) + 1
        try:
            found = self._within_epoch.latest(epoch, like)
            if found and epoch > 1:
                self._check_chosen(needed(found[1]["history"]), epoch, like.params)
            return found
        except Damaged as fault:
            warnings.warn(f"{self.folder}: within epoch {epoch}: {fault}; it begins again", Note, stacklevel=3)
            by_first(partial(self._within_epoch.drop, epoch))
            return None

    def record(self) -> dict[str, Any]:
        """The record of the latest checkpoint that has a whole one; {} where none has."""
        for epoch in reversed(self.epochs):
            try:
                return self._record(epoch)
            except Damaged:
                continue
        return {}

    def params(self, epoch: int, like: Params) -> Params:
        """The parameters that the validation of `epoch` measured, on the default device.

        Raises:
          InputError: that checkpoint is missing or damaged.
        """
        try:
            return self._read_params(epoch, like)
        except Damaged as fault:
            raise InputError(f"{self.folder}: the checkpoint of epoch {epoch} cannot be used: {fault}") from fault

    def keep_only(self, epochs: Collection[int]) -> None:
        """Deletes all other checkpoints."""
        by_first(lambda: self._delete(set(self.epochs) - set(epochs)))

    def _path(self, epoch: int) -> Path:
        return epoch_folder(self.folder, epoch)

    def _check_chosen(self, chosen: int, epoch: int, like: Params) -> None:
        """Raises Damaged where the parameters that are read in the end, of an earlier epoch, are not whole."""
        try:
            if chosen != epoch:
                self._read_params(chosen, like)
        except Damaged as fault:
            raise Damaged(f"the best one, of epoch {chosen}: {fault}") from fault

    def _record(self, epoch: int) -> dict[str, Any]:
        return read_record(self._path(epoch), self._owner, epoch)

    def _read_params(self, epoch: int, like: Params) -> Params:
        return read_evaluated(self._path(epoch), self._owner, epoch, like)


def read_chosen(
    folder: Path, owner: Owner, like: Params, choose: Callable[[History], int] = best_epoch
) -> tuple[int, Params, dict[str, Any]]:
    """The parameters that a training ended with: their epoch, they, and the record they were chosen by.

    Changes nothing on disk. Where the latest checkpoint or its choice is damaged, the one before is
    tried, with a `Note`.

    Args:
      folder: of the checkpoints of the training.
      choose: (history) -> the epoch whose parameters are asked for.

    Raises:
      InputError: there is no checkpoint, or none is whole.
    """
    damaged: dict[int, str] = {}
    for epoch in reversed(epochs_in(folder)):
        try:
            record = read_record(epoch_folder(folder, epoch), owner, epoch)
            wanted = choose(record["history"])
            params = read_evaluated(epoch_folder(folder, wanted), owner, wanted, like)
        except Damaged as fault:
            damaged[epoch] = str(fault)
            continue
        if damaged:
            used = f"the parameters of epoch {wanted} are used"
            warnings.warn(f"{folder}: {_listed(damaged)}; {used}", Note, stacklevel=2)
        return wanted, params, record
    if damaged:
        raise InputError(f"{folder}: none of the checkpoints can be used: {_listed(damaged)}")
    raise InputError(f"{folder.parent}: has no checkpoint yet")


def _listed(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"epoch {epoch}: {fault}" for epoch, fault in damaged.items())
