"""One checkpoint, a folder that Orbax writes and reads; nothing of it is used that is not what its manifest says."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from newllm_jax.errors import InputError, memory_fault
from newllm_jax.files import read_json
from newllm_jax.processes import are_several
from newllm_jax.training.average import Average
from newllm_jax.training.manifest import Damaged, Owner, Trees, check_arrays, check_shapes, read_manifest
from newllm_jax.training.step import Params, TrainState

NAME = re.compile(r"epoch_([1-9]\d{0,8})")
DELETED = ".deleted-"
MANIFEST, RECORD = "manifest", "record"  # the JSON of a checkpoint; version 0.1.0 wrote a record only


def epoch_folder(folder: Path, epoch: int) -> Path:
    """The checkpoint of an epoch among the checkpoints of a training."""
    return folder / f"epoch_{epoch}"


def epochs_in(folder: Path) -> list[int]:
    """The epochs that have a checkpoint, rising."""
    names = map(NAME.fullmatch, (path.name for path in folder.iterdir())) if folder.is_dir() else ()
    return sorted(int(name[1]) for name in names if name)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process was writing or deleting among the checkpoints in a folder."""
    for leftover in folder.iterdir() if folder.is_dir() else ():
        if leftover.name.startswith(DELETED) or ".orbax-checkpoint-tmp" in leftover.name:
            shutil.rmtree(leftover)


def delete(checkpoint: Path) -> None:
    """Renames first: a deletion that is cut short leaves nothing that looks like a checkpoint."""
    doomed = checkpoint.with_name(f"{DELETED}{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def check_room(folder: Path, state: TrainState, what: str) -> None:
    """Raises InputError where the disk of `folder` has no room for a checkpoint of the state."""
    needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(folder).free
    if free < 1.2 * needed:
        sizes = f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
        raise InputError(f"{folder}: no room for the checkpoint {what} ({sizes}); make room and resume")


def state_trees(state: TrainState) -> dict[str, Any]:
    """The parts of a state by their names. Absent ones (None) are not saved."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: tree for name, tree in parts.items() if tree is not None}


def contents(manifest: Mapping[str, Any], trees: Trees) -> ocp.args.Composite:
    """What Orbax writes into the folder."""
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}  # type: ignore[call-arg]
    return ocp.args.Composite(**{MANIFEST: ocp.args.JsonSave(dict(manifest))}, **arrays)  # type: ignore[call-arg]


def read_record(folder: Path, owner: Owner, epoch: int) -> dict[str, Any]:
    """What a checkpoint holds beside arrays: history, seconds. Raises Damaged as `read_manifest` does."""
    return _read_json(folder, owner, epoch)[0]


def read_trees(folder: Path, owner: Owner, epoch: int, like: Trees) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Parts of the state on the default device, the record, and whether a manifest confirmed both.

    Args:
      like: the parts that are read, as trees of arrays or of their shapes and types.

    Raises:
      Damaged: the checkpoint is missing, or not what it says, or its arrays have other shapes or types.
    """
    record, manifest = _read_json(folder, owner, epoch)
    with _reading():
        if manifest:
            check_shapes(manifest, like)
        for name, tree in like.items():
            _check_layout(folder / name, tree)
        items = ocp.args.Composite(**{name: _restore_like(tree) for name, tree in like.items()})
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder.absolute(), items)
        trees = {name: _unpinned(restored[name]) for name in like}
        if manifest:
            check_arrays(manifest, trees)
    return trees, record, manifest is not None


def read_evaluated(folder: Path, owner: Owner, epoch: int, like: Params) -> Params:
    """The parameters that validation measured, on the default device: their moving average where there is one.

    Args:
      like: a tree of arrays, or of their shapes and types.

    Raises:
      Damaged: as `read_trees` does.
    """
    _, manifest = _read_json(folder, owner, epoch)
    if manifest is None or "ema" not in manifest["arrays"]:
        return read_trees(folder, owner, epoch, {"params": like})[0]["params"]
    average = Average(like, jax.ShapeDtypeStruct((), jnp.int32))
    return read_trees(folder, owner, epoch, {"ema": average})[0]["ema"].params


def _read_json(folder: Path, owner: Owner, epoch: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The record of a checkpoint and its manifest, None for one of version 0.1.0."""
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged("it is missing")
    if owner.run_id or (folder / MANIFEST).exists():
        manifest = read_manifest(folder / MANIFEST / "metadata", owner, epoch)
        return manifest["record"], manifest
    with _reading():
        record = read_json(folder / RECORD / "metadata")
        if len(record["history"]) != epoch:
            raise Damaged(f"its record is of {len(record['history'])} epochs")
        return record, None


@contextmanager
def _reading() -> Iterator[None]:
    """Turns whatever a damaged file makes Orbax raise into Damaged; memory that does not suffice is no damage."""
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        if memory_fault(error):
            raise
        raise Damaged(f"it cannot be read ({' '.join(str(error).split())[:200] or type(error).__name__})") from error


def _check_layout(folder: Path, tree: Any) -> None:
    """Raises Damaged where reading the arrays in a folder would take more memory than they have numbers.

    Array files say themselves in which chunks they are read, and a chunk is allocated before anything of it is seen.
    """
    import tensorstore

    most = max(leaf.size for leaf in jax.tree.leaves(tree))

    def size(shape: Any) -> float:
        return float(np.prod(np.asarray(shape, float)))

    files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.absolute()}/"}}
    for key in tensorstore.KvStore.open(files).result().list().result():
        name, _, file = key.decode().rpartition("/")
        if file == ".zarray":
            array = tensorstore.open({"driver": "zarr", "kvstore": {**files, "path": f"{name}/"}}).result()
            if max(size(array.shape), size(array.chunk_layout.read_chunk.shape)) > most:
                raise Damaged(f"{folder.name}: {name} is larger than it should be")


def _restore_like(tree: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if are_several():  # each of them reads all of it
        sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices(), "all"), jax.sharding.PartitionSpec())
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
    return ocp.args.StandardRestore(abstract)  # type: ignore[call-arg]


def _unpinned(tree: Any) -> Any:
    """Copies of arrays that are committed to no device: JAX would compile again for committed ones."""
    return jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), tree)
