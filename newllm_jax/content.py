"""Hashes of what arrays and JSON files hold, so that a file is read as what was written or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from newllm_jax.errors import Note
from newllm_jax.files import whole_file

Shapes: TypeAlias = Mapping[str, tuple[Any, tuple[int, ...]]]  # of arrays by name: type and shape

TYPES = {  # of arrays in a safetensors file, by the names that they have there
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
        "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
    }.items()
}  # fmt: skip
LARGEST_HEADER = 2**20  # bytes, of a file whose arrays are mapped
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


class ArrayWriter:
    """Takes the content of the arrays of a file, one after another, each in as many pieces as one likes."""

    def __init__(self, stream: BinaryIO, digest: hashlib._Hash) -> None:
        self._stream, self._digest, self.size = stream, digest, 0

    def write(self, piece: np.ndarray | bytes) -> None:
        """The next piece of the array that is being written, or the first one of the next array."""
        data = piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).view(np.uint8).data
        self._stream.write(data)
        self._digest.update(data)
        self.size += len(data) if isinstance(data, bytes) else data.nbytes


@contextmanager
def arrays_written(file: Path, key: Any, shapes: Shapes) -> Iterator[ArrayWriter]:
    """Writes a file as `write_arrays` does, piece by piece. It is there when the context has ended well.

    Args:
      shapes: the arrays, in the order in which their content is written.

    Raises:
      OSError: a disk that takes no more.
      ValueError: what was written is not as much as the shapes say.
    """
    names, entries, size = {kind: name for name, kind in TYPES.items()}, dict[str, Any](), 0
    for name, (kind, shape) in shapes.items():
        end = size + math.prod(shape) * np.dtype(kind).itemsize
        entries[name] = {"dtype": names[np.dtype(kind)], "shape": list(shape), "data_offsets": [size, end]}
        size = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # arrays begin at a multiple of their items' size where larger items come first
    with whole_file(file) as partial, partial.open("wb") as stream:
        digest = _key_sha256(key)
        stream.write(bytes(digest.digest_size))
        writer = ArrayWriter(stream, digest)
        writer.write(len(header).to_bytes(8, "little") + header)
        before = writer.size
        yield writer
        if writer.size - before != size:
            raise ValueError(f"{writer.size - before:,} bytes were written of arrays of {size:,}")
        stream.seek(0)
        stream.write(digest.digest())


def map_arrays(file: Path, key: Any) -> dict[str, np.ndarray] | None:
    """`read_arrays`, but the arrays stay in the file, mapped into memory: they cannot be changed.

    The whole file is read once, for its hash, some of it at a time. A file that replaces it, or its deletion, changes
    nothing of what is mapped; but whoever cuts it shorter ends this process, with SIGBUS.
    """
    try:
        if not file.is_file():
            return None
        with file.open("rb") as stream:
            written = stream.read(hashlib.sha256().digest_size)
            if hashlib.file_digest(stream, lambda: _key_sha256(key)).digest() == written:
                return _mapped(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), len(written))
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # the hash is right: somebody else wrote it
    note_damage(file)
    return None


def _mapped(content: mmap.mmap, start: int) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file that begins at `start`. Raises several errors where it is none."""
    size = int.from_bytes(content[start : start + 8], "little")
    if size > LARGEST_HEADER:
        raise ValueError("a header that is too long")
    first, last, arrays = start + 8 + size, 0, dict[str, np.ndarray]()
    for name, entry in json.loads(content[start + 8 : first]).items():
        kind, shape, (begin, end) = TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if begin != last or count * kind.itemsize != end - begin:
            raise ValueError("an array that does not follow the one before, or of another size")
        arrays[name], last = np.frombuffer(content, kind, count, first + begin).reshape(shape), end
    if first + last != len(content):
        raise ValueError("something after the last array")
    return arrays


def note_damage(file: Path) -> None:
    """Tells that what a file of `write_arrays` holds is not used."""
    warnings.warn(f"{file}: damaged, or of something else; its content is made anew", Note, stacklevel=3)


def _key_sha256(key: Any) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode() + b"\n")
