"""Checkpoints with Orbax: every few epochs, the best and the latest two, written while the next epoch runs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from newllm_jax.config import RunConfig
from newllm_jax.errors import InputError, disk_fault
from newllm_jax.training.clock import Clock
from newllm_jax.training.history import Entry
from newllm_jax.training.step import Params, TrainState


@dataclass(frozen=True)
class Checkpoint:
    """What one holds: the state after `epoch`, and the run's record (JSON: history, seconds)."""

    epoch: int
    state: TrainState
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Use it as a context: leaving waits for what is being written.

    The latest two are always kept, so that one damaged file never costs more than an epoch.
    """

    def __init__(self, folder: Path, every: int = 1, read_only: bool = False) -> None:
        keep = preservation_policy.AnyPreservationPolicy([
            preservation_policy.LatestN(2),
            preservation_policy.EveryNSteps(every),
            preservation_policy.BestN(get_metric_fn=_loss_then_epoch, reverse=True, n=1),
        ])  # fmt: skip
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            step_prefix="epoch",
            create=not read_only,  # Orbax's own `read_only` warns on every use
            cleanup_tmp_directories=not read_only,
            save_root_metadata=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self._manager.close()

    @property
    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, rising."""
        return sorted(self._manager.all_steps())

    def save(self, epoch: int, state: TrainState, record: dict[str, Any], val_loss: float) -> None:
        """Starts writing; returns once the arrays are copied.

        Raises:
          InputError: the disk has no room (nothing that is already there is harmed).
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < 1.2 * needed:
            raise InputError(
                f"{self.folder}: no room for the checkpoint of epoch {epoch} ({needed / 1e6:.1f} MB needed, "
                f"{free / 1e6:.1f} MB free); make room and resume from epoch {max(self.epochs, default=0)}"
            )
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}  # type: ignore[call-arg]
        items = ocp.args.Composite(record=ocp.args.JsonSave(record), **arrays)  # type: ignore[call-arg]
        with self._writing():
            self._manager.save(epoch, args=items, metrics={"val_loss": val_loss, "epoch": epoch})

    def wait(self) -> None:
        """Returns when everything is on the disk. Raises InputError where it has no room."""
        with self._writing():
            self._manager.wait_until_finished()

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

    def latest(self, like: TrainState) -> tuple[Checkpoint | None, list[int]]:
        """The latest checkpoint that can be read, on the default device, and the epochs of later, damaged ones.

        Args:
          like: a state of the same shapes; its values are not used.

        Raises:
          InputError: there are checkpoints, and none of them can be read.
        """
        damaged: list[int] = []
        for epoch in reversed(self.epochs):
            try:
                arrays = {name: _restore_like(tree) for name, tree in _trees(like).items()}
                items = ocp.args.Composite(record=ocp.args.JsonRestore(), **arrays)
                found = self._manager.restore(epoch, args=items)
                state = dataclasses.replace(like, **{name: _unpinned(found[name]) for name in arrays})
                return Checkpoint(epoch, state, found["record"]), damaged
            except Exception:  # whatever a damaged file makes Orbax raise, the one before it is tried
                damaged.append(epoch)
        if damaged:
            raise InputError(f"{self.folder}: none of the checkpoints can be read (epochs {damaged})")
        return None, []

    def resume(
        self, state: TrainState, config: RunConfig, clock: Clock, narrate: Callable[[str], None], what: str = ""
    ) -> tuple[TrainState, list[Entry]]:
        """State and history after the latest checkpoint that can be read; later, damaged ones are deleted.

        Args:
          state: the initial state, returned with no history where there is no checkpoint.
          clock: counts the seconds that the run took up to then.
          narrate: receives the lines that tell what was found.
          what: of which training, in those lines: "stage 2, ".

        Raises:
          InputError: none of the checkpoints can be read, or there are more epochs than `num_epochs`.
        """
        found, damaged = self.latest(state)
        if damaged:
            narrate(f"damaged checkpoints, skipped: those of {what}epochs {damaged}")
        if found is None:
            return state, []
        if found.epoch > config.num_epochs:
            raise InputError(
                f"num_epochs: {self.folder.parent} has {found.epoch} epochs already, not {config.num_epochs}"
            )
        self.drop_after(found.epoch)  # after the check, so that a refused command changes nothing
        clock.resume(found.record["seconds"])
        narrate(f"{what}continuing after epoch {found.epoch}")
        return found.state, found.record["history"]

    def record(self) -> dict[str, Any]:
        """The record of the latest checkpoint that can be read.

        Raises:
          InputError: there is none.
        """
        for epoch in reversed(self.epochs):
            try:
                return self._manager.restore(epoch, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            except Exception:  # damaged: the one before it is tried
                continue
        raise InputError(f"{self.folder}: no checkpoint that can be read")

    def params(self, epoch: int, like: Params) -> Params:
        """The parameters after `epoch`, on the default device.

        Raises:
          InputError: that checkpoint is missing or damaged.
        """
        try:
            found = self._manager.restore(epoch, args=ocp.args.Composite(params=_restore_like(like)))
            return _unpinned(found["params"])
        except Exception as error:  # whatever a damaged file makes Orbax raise
            raise InputError(f"{self.folder}: the checkpoint of epoch {epoch} cannot be read") from error

    def drop_after(self, epoch: int) -> None:
        """Deletes the checkpoints of later epochs: damaged ones, whose places the resumed run will fill again."""
        for later in [found for found in self.epochs if found > epoch]:
            self._manager.delete(later)

    def keep_only(self, epochs: Collection[int]) -> None:
        """Deletes all other checkpoints, of a training that is finished and will not continue."""
        for other in set(self.epochs) - set(epochs):
            self._manager.delete(other)


def _loss_then_epoch(metrics: Any) -> Any:
    """What the best checkpoint has least of: of equal losses the first epoch, as `history.best_epoch` has it."""
    return metrics["val_loss"], metrics.get("epoch", 0)


def _trees(state: TrainState) -> dict[str, Any]:
    """The parts of a state by their names. Absent ones (None) are not saved."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: tree for name, tree in parts.items() if tree is not None}


def _restore_like(tree: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
    return ocp.args.StandardRestore(abstract)  # type: ignore[call-arg]


def _unpinned(tree: Any) -> Any:
    """Copies of arrays that are committed to no device: JAX would compile again for committed ones."""
    return jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), tree)
