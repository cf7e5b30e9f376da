"""The user's cache folder, files that are either whole or absent, and readers of files that nobody vouches for."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import stat
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from newllm_jax.errors import InputError

LARGEST_JSON = 16 * 2**20  # bytes; far above any file of settings, results or words
LARGEST_TOML = 16 * 2**10  # a second: the time to parse a dotted key grows with the square of its length
DEEPEST = 64  # levels of nesting; what Python then prints or copies of it stays far from its recursion limit
LARGEST_NUMBER = sys.float_info.max


def cache_folder() -> Path:
    """`$NEWLLM_CACHE`, else `$XDG_CACHE_HOME/newllm_jax`, else `~/.cache/newllm_jax`; not created here."""
    own = os.environ.get("NEWLLM_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "newllm_jax"


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
    """A path to write to that becomes `path` when the block ends well, and vanishes when it does not.

    What a process that was killed left in its place vanishes too.
    """
    with naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = _claim(lambda: _new_file(path), os.O_RDWR)
        try:
            _remove_leftovers(path)
            yield partial
            partial.chmod(0o644)
            os.fsync(handle)  # else a power cut may leave an empty file under the name
            partial.replace(path)
        finally:
            os.close(handle)
            partial.unlink(missing_ok=True)


def _new_file(path: Path) -> str:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    return name


def _claim(create: Callable[[], str], flags: int) -> tuple[int, Path]:
    """A new file or folder, opened and locked for as long as this process lives.

    Before it is locked, another process can take it for a leftover and delete it: then a new one is created.
    """
    while True:
        partial = Path(create())
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(partial, flags)
            with contextlib.suppress(OSError):  # a file system without locks, where leftovers stay
                fcntl.flock(handle, fcntl.LOCK_EX)
            if partial.exists():
                return handle, partial
            os.close(handle)


def _remove_leftovers(path: Path) -> None:
    """Deletes what `whole_file` wrote to in processes that live no more."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with contextlib.suppress(OSError), other.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where one is alive
            other.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill that becomes `path` when the block ends well, and vanishes when it does not.

    What a process that was killed left in its place vanishes too.

    Raises:
      OSError: `path` is there and no empty folder, or the disk takes no more.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = f".{path.name}.partial-"
        handle, partial = _claim(lambda: tempfile.mkdtemp(dir=path.parent, prefix=name), os.O_RDONLY)
        try:
            _remove_partial_folders(path)
            yield partial
            partial.chmod(0o755)
            os.fsync(handle)  # else a power cut may leave a folder without its files
            partial.replace(path)
        finally:
            os.close(handle)
            shutil.rmtree(partial, ignore_errors=True)


def _remove_partial_folders(path: Path) -> None:
    """Deletes what `whole_folder` filled in processes that live no more."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.partial-*/"):
        with contextlib.suppress(OSError):
            handle = os.open(other, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where one is alive
                shutil.rmtree(other)
            finally:
                os.close(handle)


def file_size(path: Path) -> int:
    """Bytes of a file that can be read to its end.

    Raises:
      InputError: it is absent or cannot be looked at; or it is a folder, pipe or device, which has no end.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a null byte or lone surrogate in the name
        raise InputError(f"{path!r}: not a file name ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: not a regular file")
    return found.st_size


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
      InputError: not a regular file, not readable, larger than `largest` bytes, or not UTF-8.
    """
    size = file_size(path)
    if size > largest:
        raise InputError(f"{path}: {size:,} bytes; a file of this kind may have {largest:,}")
    try:
        with path.open("rb") as stream:
            return stream.read(largest).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, name: str) -> Any:
    """The content of a JSON text.

    Args:
      name: of the file, for errors.

    Raises:
      InputError: not JSON; or what JSON leaves open and no file of ours has: a key that is there twice, NaN and
        infinity, numbers beyond float64, halves of surrogate pairs, nesting without end.
    """
    try:
        return _checked(json.loads(text, object_pairs_hook=_unique_keys))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not valid JSON ({_reason(error)})") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file, checked as that of a JSON file is. Raises InputError."""
    text = read_text(path, LARGEST_TOML)
    try:
        return _checked(tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice[:50]!r} is there twice")
    return content


def _checked(content: Any) -> Any:
    """The content. Raises ValueError where a value would fail later, where it is used, printed or written."""
    level, depth = [content], 0
    while level:
        if depth == DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                if not value.isascii():
                    value.encode()  # UnicodeEncodeError, a ValueError
            elif isinstance(value, int | float) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
                raise ValueError("a number that is not finite or beyond float64")
        level, depth = below, depth + 1
    return content
