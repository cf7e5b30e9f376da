"""Hashes of what arrays and JSON files hold, so that a file is read as what was written or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from newllm_jax.errors import Note
from newllm_jax.files import whole_file

SEAL = "sha256"  # the key of the hash in a sealed JSON object


def array_sha256(array: np.ndarray) -> str:
    """sha256 over type, shape and values (in C order) of an array of numbers or text, wherever it lies in memory.

    Raises:
      TypeError: an array of Python objects, which has no bytes of its own.
    """
    if array.dtype.hasobject:
        raise TypeError(f"an array of Python objects has no hash ({array.dtype})")
    # The name tells bfloat16 from other types of two bytes, `str` tells the byte order.
    digest = hashlib.sha256(f"{array.dtype.name} {array.dtype.str} {array.shape}\n".encode())
    digest.update(array.ravel(order="C").view(np.uint8).data)  # bfloat16 is no buffer as it is
    return digest.hexdigest()


def json_sha256(content: Any) -> str:
    """sha256 of JSON content, whatever its layout in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def finite(content: Any) -> Any:
    """JSON has no infinity: a perplexity that overflows is null."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of its content, so that a change is noticed; all its numbers are finite."""
    content = finite(content)
    return {**content, SEAL: _unsealed_sha256(content)}


def check_seal(content: Any, required: bool) -> None:
    """Checks what `sealed` gave.

    Args:
      required: whether a missing hash is a fault; files of version 0.1.0 have none.

    Raises:
      ValueError: no JSON object, or its content is not what was written.
    """
    if not isinstance(content, dict):
        raise ValueError("a JSON object is expected")
    if required and SEAL not in content:
        raise ValueError(f"it has no {SEAL}")
    if SEAL in content and content[SEAL] != _unsealed_sha256(content):
        raise ValueError(f"its content does not fit its {SEAL}: it was changed after it was written")


def _unsealed_sha256(content: Mapping[str, Any]) -> str:
    return json_sha256({key: value for key, value in content.items() if key != SEAL})


def write_arrays(file: Path, key: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays for `read_arrays`: a sha256 over key and content, then the content, as in a safetensors file.

    Args:
      key: what the arrays are, as JSON content: all that they depend on. It is not in the file.

    Raises:
      OSError: a disk that takes no more.
    """
    content = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    digest = _key_sha256(key)
    digest.update(content)
    with whole_file(file) as partial, partial.open("wb") as stream:
        stream.write(digest.digest())
        stream.write(content)


def read_arrays(file: Path, key: Any) -> dict[str, np.ndarray] | None:
    """The arrays of a file of `write_arrays`; None where it is absent or, with a `Note`, not what was written.

    Nothing of it is used, or kept in memory, before its hash is right.

    Args:
      key: as it was when the file was written; with another one the arrays are of something else.
    """
    try:
        if not file.is_file():
            return None
        with file.open("rb") as stream:
            written = stream.read(hashlib.sha256().digest_size)
            if hashlib.file_digest(stream, lambda: _key_sha256(key)).digest() == written:
                stream.seek(len(written))
                return load(stream.read())
    except OSError:
        return None
    except (SafetensorError, ValueError, KeyError):
        pass  # the hash is right: somebody else wrote it
    note_damage(file)
    return None


def note_damage(file: Path) -> None:
    """Tells that what a file of `write_arrays` holds is not used."""
    warnings.warn(f"{file}: damaged, or of something else; its content is made anew", Note, stacklevel=3)


def _key_sha256(key: Any) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode() + b"\n")
