"""What a checkpoint is: whose, after which epoch, and the hash of every array in it.

The files of a checkpoint have no checksum over their arrays, so that damage would be read as if it were right. The
manifest is written into the checkpoint and becomes visible with it, as one. Its hashes are over what was in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import jax

from newllm_jax.content import array_sha256, check_seal, json_sha256, sealed
from newllm_jax.files import read_json
from newllm_jax.processes import host_copies

FORMAT = 1
Trees: TypeAlias = Mapping[str, Any]  # the parts of a state by their names: `params`, `opt_state`


class Damaged(Exception):
    """A checkpoint that is not what it says, or not there; the text says in what."""


@dataclass(frozen=True)
class Owner:
    """Whose checkpoints these are.

    Attributes:
      run_id: the identity of the run; "" for a run of version 0.1.0, whose checkpoints may lack a manifest.
      part: which training of the run: "" where there is one, else `stage_2`.
      after: the hash of the weights whose outputs it is trained on; "" where they are no part of the run.
      description: what a manifest tells of the run (JSON): settings, fingerprints, versions.
    """

    run_id: str = ""
    part: str = ""
    after: str = ""
    description: Mapping[str, Any] = field(default_factory=dict)


def manifest(owner: Owner, epoch: int, trees: Trees, record: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a checkpoint (JSON).

    Args:
      trees: of arrays, on any device.
      record: what else the checkpoint holds (JSON): history, seconds.
    """
    return sealed({
        "format": FORMAT,
        "run_id": owner.run_id,
        "part": owner.part,
        "after": owner.after,
        "epoch": epoch,
        "run": dict(owner.description),
        "record": dict(record),
        "arrays": {name: _describe(tree, hashed=True) for name, tree in trees.items()},
    })  # fmt: skip


def read_manifest(file: Path, owner: Owner, epoch: int) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
      Damaged: it is not whole, or that of another run, part or epoch.
    """
    try:
        content = read_json(file)
        check_seal(content, required=True)
    except ValueError as error:  # InputError is one
        raise Damaged(f"its manifest is damaged ({error})") from error
    expected = {
        "format": FORMAT, "run_id": owner.run_id, "part": owner.part, "after": owner.after, "epoch": epoch,
    }  # fmt: skip
    for name, value in expected.items():
        if content.get(name, "") != value:
            raise Damaged(f"it is another's: {name} {content.get(name)!r}, not {value!r}")
    record = content.get("record")
    if not isinstance(record, dict) or not isinstance(record.get("history"), list):
        raise Damaged("its manifest has no record of the epochs before")
    return content


def check_shapes(found: Mapping[str, Any], trees: Trees) -> None:
    """Raises Damaged where the arrays of a manifest are not of the shapes and types of `trees`."""
    for name, tree in trees.items():
        expected, described = _describe(tree), found["arrays"].get(name, {})
        for path in expected.keys() | described.keys():
            one, other = described.get(path, {}), expected.get(path, {})
            if (one.get("dtype"), one.get("shape")) != (other.get("dtype"), other.get("shape")):
                raise Damaged(f"{name}{path} is {_form(one)}, expected {_form(other)}")


def check_arrays(found: Mapping[str, Any], trees: Trees) -> None:
    """Raises Damaged where arrays are not those that the manifest was written for."""
    for name, tree in trees.items():
        for path, entry in _describe(tree, hashed=True).items():
            if found["arrays"][name].get(path) != entry:
                raise Damaged(f"{name}{path} is not what was written")


def tree_sha256(tree: Any) -> str:
    """A hash of all arrays of a tree and their names."""
    return json_sha256(_describe(tree, hashed=True))


def _describe(tree: Any, hashed: bool = False) -> dict[str, dict[str, Any]]:
    """Type and shape of each array of a tree by its path, and the hash of its content where asked for."""
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    entries = {path: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)} for path, leaf in leaves}
    if hashed:
        arrays = host_copies([leaf for _, leaf in leaves])
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing lets other threads run
            for entry, digest in zip(entries.values(), threads.map(array_sha256, arrays), strict=True):
                entry["sha256"] = digest
    return entries


def _form(entry: Mapping[str, Any]) -> str:
    return f"{entry['dtype']} {entry['shape']}" if entry else "absent"
