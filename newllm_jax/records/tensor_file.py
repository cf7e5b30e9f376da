"""Trees of arrays as safetensors files, read strictly: every tensor is known, is there, and has its shape and type.

Nothing is unpickled. A header is looked at before the `safetensors` package reads it: its length, and each name once.
The package itself checks that types, shapes and offsets fit the file, and that no tensors lie over one another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from newllm_jax.errors import InputError
from newllm_jax.files import LARGEST_JSON, file_size, parse_json, whole_file


def check_header(path: Path) -> None:
    """Raises InputError where a file is too short for its header, or the header is too long, no JSON or ambiguous."""
    size = file_size(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, LARGEST_JSON):
            raise InputError(f"{path}: truncated or not a safetensors file (a header of {length} bytes)")
        header = stream.read(length)
    try:
        parse_json(header.decode(), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: truncated or not a safetensors file (a header that is not UTF-8)") from error


def write_tree(file: Path, tree: Any) -> None:
    """Writes the leaves of a tree, float32, each under its keys with dots between: `cell.gates_kernel`."""
    from safetensors.numpy import save_file

    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    tensors = {_name(path): np.ascontiguousarray(leaf, np.float32) for path, leaf in leaves}
    with whole_file(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})  # transformers and PEFT ask for a format they know


def read_tree(file: Path, like: Any) -> Any:
    """The tree of NumPy arrays that `write_tree` wrote.

    Args:
      like: a tree of what has a shape, with the keys of that tree.

    Raises:
      InputError: naming file and tensor: one that is unknown, missing, of another shape or type, or not finite; a
        truncated or corrupt file.
    """
    from safetensors import SafetensorError, safe_open

    check_header(file)
    shapes = {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    arrays = dict[str, np.ndarray]()
    try:
        with safe_open(file, framework="numpy") as opened:
            found = set(opened.keys())
            for name in sorted(found ^ shapes.keys()):
                raise InputError(f"{file}: tensor {name!r} is {'not expected' if name in found else 'missing'}")
            for name, shape in shapes.items():
                part = opened.get_slice(name)
                kind, its = part.get_dtype(), tuple(part.get_shape())
                if (kind, its) != ("F32", shape):
                    raise InputError(f"{file}: tensor {name!r} is {kind} {list(its)}, expected F32 {list(shape)}")
                arrays[name] = opened.get_tensor(name)
                if not np.isfinite(arrays[name]).all():
                    raise InputError(f"{file}: tensor {name!r} has values that are not finite")
    except SafetensorError as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error})") from error
    return jax.tree.unflatten(jax.tree.structure(like), arrays.values())


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
