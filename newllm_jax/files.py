"""The user's cache folder, and files that are either whole or absent."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from newllm_jax.errors import InputError


def cache_folder() -> Path:
    """`$NEWLLM_CACHE`, else `$XDG_CACHE_HOME/newllm_jax`, else `~/.cache/newllm_jax`; not created here."""
    own = os.environ.get("NEWLLM_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "newllm_jax"


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in an OSError that names none: a full disk is noticed by a write, which knows no names."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends well, and vanishes when it does not."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o644)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
