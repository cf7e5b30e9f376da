"""Checkpoints with Orbax: every few epochs, the best and the latest two, written while the next epoch runs.

What is read is what was written: `checkpoint_folder` sees to that.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import jax
import orbax.checkpoint as ocp

from newllm_jax.config import RunConfig
from newllm_jax.errors import InputError, Note, disk_fault
from newllm_jax.training.checkpoint_folder import contents, epoch_folder, epochs_in, read_record, read_trees
from newllm_jax.training.clock import Clock
from newllm_jax.training.history import Entry, History, best_epoch
from newllm_jax.training.manifest import Damaged, Owner, manifest
from newllm_jax.training.step import Params, TrainState

DELETED = ".deleted-"

Keep: TypeAlias = Callable[[Sequence[int], History], Collection[int]]  # (epochs with a checkpoint, rising; history)


def every_few_epochs(every: int) -> Keep:
    """Which checkpoints stay: every few epochs, the best, and the latest two, so that a damaged one costs an epoch."""

    def keep(epochs: Sequence[int], history: History) -> set[int]:
        return {*(epoch for epoch in epochs if epoch % every == 0), *epochs[-2:], best_epoch(history)}

    return keep


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
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.iterdir():  # of a process that was killed
            if leftover.name.startswith(DELETED) or ".orbax-checkpoint-tmp" in leftover.name:
                shutil.rmtree(leftover)

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
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < 1.2 * needed:
            raise InputError(
                f"{self.folder}: no room for the checkpoint of epoch {epoch} ({needed / 1e6:.1f} MB needed, "
                f"{free / 1e6:.1f} MB free); make room and resume from epoch {max(self.epochs, default=0)}"
            )
        trees = _trees(state)
        content = manifest(self._owner, epoch, trees, {**(record or {}), "history": [*history]})
        self._history = [*history]
        with self._writing():
            self._checkpointer.save(self._path(epoch), contents(content, trees))

    def wait(self) -> None:
        """Returns when everything is on the disk and no more than what is to stay.

        Raises:
          InputError: the disk has no room.
        """
        with self._writing():
            self._checkpointer.wait_until_finished()
            if self._keep and self._history:
                self.keep_only(self._keep(self.epochs, self._history))

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
                trees, record, is_verified = read_trees(self._path(epoch), self._owner, epoch, _trees(like))
                self._check_chosen(needed(record["history"]), epoch, like.params)
                return Checkpoint(epoch, dataclasses.replace(like, **trees), record, is_verified), damaged
            except Damaged as fault:
                damaged[epoch] = str(fault)
        if damaged:
            raise InputError(f"{self.folder}: none of the checkpoints can be used: {_listed(damaged)}")
        return None, {}

    def resume(
        self,
        state: TrainState,
        config: RunConfig,
        clock: Clock,
        narrate: Callable[[str], None],
        needed: Callable[[History], int] = best_epoch,
    ) -> tuple[TrainState, list[Entry]]:
        """State and history after the latest checkpoint that is whole; later, damaged ones are deleted.

        Args:
          state: the initial state, returned with no history where there is no checkpoint.
          clock: counts the seconds that the run took up to then.
          narrate: receives the lines that tell what was found.
          needed: as in `latest`.

        Raises:
          InputError: none of the checkpoints is whole, or there are more epochs than `num_epochs`.
        """
        found, damaged = self.latest(state, needed)
        of_part = f"{self._owner.part.replace('_', ' ')}, " if self._owner.part else ""
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
        for later in [epoch for epoch in self.epochs if epoch > found.epoch]:  # the resumed run fills their places
            self._delete(later)
        clock.resume(found.record["seconds"])
        narrate(f"{of_part}continuing after epoch {found.epoch}")
        self._history = found.record["history"]
        return found.state, [*found.record["history"]]

    def record(self) -> dict[str, Any]:
        """The record of the latest checkpoint that has a whole one; {} where none has."""
        for epoch in reversed(self.epochs):
            try:
                return self._record(epoch)
            except Damaged:
                continue
        return {}

    def params(self, epoch: int, like: Params) -> Params:
        """The parameters after `epoch`, on the default device.

        Raises:
          InputError: that checkpoint is missing or damaged.
        """
        try:
            return self._read_params(epoch, like)
        except Damaged as fault:
            raise InputError(f"{self.folder}: the checkpoint of epoch {epoch} cannot be used: {fault}") from fault

    def keep_only(self, epochs: Collection[int]) -> None:
        """Deletes all other checkpoints."""
        for other in set(self.epochs) - set(epochs):
            self._delete(other)

    def _path(self, epoch: int) -> Path:
        return epoch_folder(self.folder, epoch)

    def _delete(self, epoch: int) -> None:
        """Renames first: a deletion that is cut short leaves nothing that looks like a checkpoint."""
        doomed = self.folder / f"{DELETED}epoch_{epoch}"
        self._path(epoch).rename(doomed)
        shutil.rmtree(doomed)

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
        return read_trees(self._path(epoch), self._owner, epoch, {"params": like})[0]["params"]


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
            trees, _, _ = read_trees(epoch_folder(folder, wanted), owner, wanted, {"params": like})
        except Damaged as fault:
            damaged[epoch] = str(fault)
            continue
        if damaged:
            used = f"the parameters of epoch {wanted} are used"
            warnings.warn(f"{folder}: {_listed(damaged)}; {used}", Note, stacklevel=2)
        return wanted, trees["params"], record
    if damaged:
        raise InputError(f"{folder}: none of the checkpoints can be used: {_listed(damaged)}")
    raise InputError(f"{folder.parent}: has no checkpoint yet")


def _listed(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"epoch {epoch}: {fault}" for epoch, fault in damaged.items())


def _trees(state: TrainState) -> dict[str, Any]:
    """The parts of a state by their names. Absent ones (None) are not saved."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: tree for name, tree in parts.items() if tree is not None}
