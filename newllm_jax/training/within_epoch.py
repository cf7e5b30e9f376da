"""The latest checkpoint within an epoch, for epochs of hours: there until the epoch's own is whole.

It holds what an epoch's does and, beside the state, the totals of the epoch so far; its folder lies among those.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from newllm_jax.processes import by_first
from newllm_jax.training.checkpoint_folder import (
    check_room,
    contents,
    delete,
    read_trees,
    remove_leftovers,
    state_trees,
)
from newllm_jax.training.history import History
from newllm_jax.training.manifest import Damaged, Owner, manifest
from newllm_jax.training.place import Place
from newllm_jax.training.step import Totals, TrainState

NAME = re.compile(r"epoch_(\d{1,9})_update_(\d{1,18})")
TOTALS = "totals"


class WithinEpoch:
    """The checkpoints within epochs of one training, beside those of its epochs."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        """`folder`: of the checkpoints of the epochs."""
        self._folder = folder / "within_epoch"
        self._owner = dataclasses.replace(owner, part=f"{owner.part}/within_epoch")
        by_first(lambda: remove_leftovers(self._folder))

    def save(self, place: Place, history: History, record: Mapping[str, Any]) -> None:
        """Returns when it is whole and the one before is deleted.

        Args:
          history: of the epochs before.
          record: what else the checkpoint holds (JSON).

        Raises:
          InputError: the disk has no room.
        """
        by_first(lambda: self._folder.mkdir(exist_ok=True))
        trees = {**state_trees(place.state), TOTALS: place.totals}
        kept = {"done": place.done, "skipped_before": place.skipped_before, "epoch_seconds": place.seconds}
        content = manifest(self._owner, place.epoch, trees, {**record, **kept, "history": [*history]})
        folder = self._folder / f"epoch_{place.epoch}_update_{place.done}"
        if not folder.exists():
            check_room(self._folder, place.state, f"within epoch {place.epoch}")
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(folder, contents(content, trees))
        by_first(lambda: self._delete_others(folder))

    def _delete_others(self, folder: Path) -> None:
        for other in self._found():
            if other != folder:
                delete(other)

    def latest(self, epoch: int, like: TrainState) -> tuple[Place, dict[str, Any]] | None:
        """The place in an epoch that was saved last, and the record; None where there is none.

        Args:
          like: a state of the same shapes; its values are not used.

        Raises:
          Damaged: it is not what was written.
        """
        for folder, (of_epoch, done) in self._found().items():
            if of_epoch == epoch:
                wanted = {**state_trees(like), TOTALS: Totals.zero()}
                trees, record, _ = read_trees(folder, self._owner, epoch, wanted)
                if (record["done"], len(record["history"]) + 1) != (done, epoch):
                    raise Damaged(f"it is of update {record['done']} of epoch {len(record['history']) + 1}")
                totals = trees.pop(TOTALS)
                state = dataclasses.replace(like, **trees)
                return Place(epoch, done, state, totals, record["skipped_before"], record["epoch_seconds"]), record
        return None

    def drop(self, epoch: int) -> None:
        """Deletes what is not needed once the checkpoint of `epoch` is whole."""
        for folder, (of_epoch, _) in self._found().items():
            if of_epoch <= epoch:
                delete(folder)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _found(self) -> dict[Path, tuple[int, int]]:
        """The checkpoints, the latest first: one, or two where a process was killed between writing and deleting."""
        names = {path: NAME.fullmatch(path.name) for path in self._folder.iterdir()} if self._folder.is_dir() else {}
        places = {path: (int(name[1]), int(name[2])) for path, name in names.items() if name}
        return dict(sorted(places.items(), key=lambda found: found[1], reverse=True))
