"""A look at a safetensors header before the `safetensors` package reads it: its length, and each name once.

The package itself checks that types, shapes and offsets fit the file, and that no tensors lie over one another.
"""

from __future__ import annotations

from pathlib import Path

from newllm_jax.errors import InputError
from newllm_jax.files import LARGEST_JSON, file_size, parse_json


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
