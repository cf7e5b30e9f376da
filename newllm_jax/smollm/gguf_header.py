"""A scan of a GGUF header, for the `gguf` package believes every count, length and offset that a file names.

    "GGUF", version, number of tensors, number of keys
    keys      name, type, value; of an array: type and number of its elements, elements
    tensors   name, number of axes, length of each axis, type, offset in the data
    data      from the next multiple of the key general.alignment on

Numbers are little endian, names and texts have their length in front (specification of GGUF, versions 2 and 3).
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from newllm_jax.errors import InputError
from newllm_jax.files import file_size

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes
UINT32, TEXT, ARRAY = 4, 8, 9
VERSIONS = (2, 3)
MOST_AXES = 4
MOST_KEYS, MOST_TENSORS = 10_000, 100_000
MOST_ELEMENTS = 600_000  # of all arrays; SmolLM2 has 147,000. Each costs the package 12 microseconds and 1 KB


def check_header(path: Path) -> None:
    """Raises InputError where a file is not GGUF, or its header names more than the file has, or a part of it twice."""
    file_size(path)
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _Scan(data).header()
            except (ValueError, KeyError, struct.error) as error:
                raise InputError(f"{path}: truncated or corrupt ({error})") from error


class _Scan:
    """A place in a file, which moves on with what is read. Raises ValueError or struct.error beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place, self.elements = data, 4, 0

    def header(self) -> None:
        version, tensors, keys = self.number(U32), self.number(U64), self.number(U64)
        if version not in VERSIONS:
            raise ValueError(f"version {version} or big-endian numbers; 2 and 3, little-endian, can be read")
        if keys > MOST_KEYS or tensors > MOST_TENSORS:
            raise ValueError(f"{keys} keys and {tensors} tensors; at most {MOST_KEYS} and {MOST_TENSORS} are read")
        alignment = 32
        for _ in range(keys):
            name, kind, start = self.text(), self.number(U32), self.place
            self.value(kind)
            if name == b"general.alignment" and kind == UINT32:
                alignment = max(U32.unpack_from(self.data, start)[0], 1)
        before = 0
        for start, end in sorted(self.tensor() for _ in range(tensors)):
            if start < before:
                raise ValueError("tensors lie over one another")
            before = end
        if tensors and -(-self.place // alignment) * alignment + before > len(self.data):
            raise ValueError("a tensor ends beyond the end of the file")

    def number(self, kind: struct.Struct) -> int:
        value: int = kind.unpack_from(self.data, self.place)[0]
        self.place += kind.size
        return value

    def skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self.data):
            raise ValueError("ends in the middle of its header")

    def text(self) -> bytes:
        length = self.number(U64)
        start = self.place
        self.skip(length)
        return self.data[start : self.place]

    def value(self, kind: int) -> None:
        """Goes past a value of a key."""
        if kind == TEXT:
            self.skip(self.number(U64))
        elif kind == ARRAY:
            kind, count = self.number(U32), self.number(U64)
            self.elements += count
            if self.elements > MOST_ELEMENTS:
                raise ValueError(f"arrays of more than {MOST_ELEMENTS} elements")
            if kind == TEXT:
                for _ in range(count):
                    self.skip(self.number(U64))
            else:
                self.skip(count * self.scalar(kind))  # an array of arrays is of no known type either
        else:
            self.skip(self.scalar(kind))

    def scalar(self, kind: int) -> int:
        """The bytes of a scalar type."""
        if kind not in SCALARS:
            raise ValueError(f"a value of the unknown type {kind}")
        return SCALARS[kind]

    def tensor(self) -> tuple[int, int]:
        """Where a tensor begins and ends in the data."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, count = self.text()[:80].decode(errors="replace"), self.number(U32)
        if not 1 <= count <= MOST_AXES:
            raise ValueError(f"tensor {name!r} has {count} axes")
        axes = [self.number(U64) for _ in range(count)]
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(self.number(U32))]
        values = math.prod(axes)
        if not values or axes[0] % block:
            raise ValueError(f"tensor {name!r} of shape {axes[::-1]} is empty, or no whole blocks of {block} values")
        start = self.number(U64)
        return start, start + values // block * width
