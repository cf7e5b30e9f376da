"""The folder of compiled programs: what one command compiles, the next ones read."""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from newllm_jax.errors import InputError
from newllm_jax.files import cache_folder, whole_file

# JAX has a limit of its own, `jax_compilation_cache_max_size`, which would be worse. It keeps the time of the last use
# of a program in a second file, and reads all of these before it writes a program (28 ms where there are 1000). Where
# one is missing, because a process was killed between the two writes or ran without the limit, no program is written
# any more. And it holds a lock, for which others wait up to 10 s, around every read and write.
LARGEST = 2**28  # bytes of all programs, all of which are hashed when a command starts: 0.2 s
ENTRIES = "*-cache"  # JAX's name for a program
SEALS = ".sha256"  # added to it: the hash that a command leaves of the programs it wrote


def program_folder() -> Path:
    """The folder for programs of this kind of processor. Makes it if it is missing, and keeps it below the size limit.

    The programs that were not used for longest are deleted first. Machines that share a home may differ in what their
    processors can do, and what is compiled for one can crash on another.

    Programs that are not what a command sealed are deleted before: JAX runs what it finds under a name. It has no
    checksum where `zstandard` is installed, and then a damaged program can crash or compute something else.

    Raises:
      InputError: it belongs to another user, or others can write to it: they could make this user run any program.
      OSError: it cannot be made.
    """
    folder = cache_folder() / f"programs-{_processor()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(
            f"{folder} is another user's or others can write to it: compiled programs are not stored there"
        )
    for entry in folder.glob(ENTRIES):
        if not _is_sealed(entry):
            _delete(entry)
    size = 0
    for _, entry_size, entry in sorted(_programs(folder), reverse=True):
        size += entry_size
        if size > LARGEST:
            _delete(entry)
    return folder


def seal_programs(folder: Path) -> None:
    """Seals the programs that have no seal yet: those that this command wrote. Raises OSError where it cannot."""
    for entry in folder.glob(ENTRIES):
        if not _seal_file(entry).exists():
            with suppress(FileNotFoundError), whole_file(_seal_file(entry)) as partial:
                partial.write_bytes(_hash(entry))


def forget_programs(folder: Path) -> None:
    """Deletes all programs, because one of them is damaged and JAX would never replace it."""
    for entry in folder.glob(ENTRIES):
        _delete(entry)


def _is_sealed(entry: Path) -> bool:
    try:
        regular = entry.is_file() and _seal_file(entry).is_file()  # a pipe would be waited for
        return regular and _seal_file(entry).read_bytes() == _hash(entry)
    except OSError:
        return False


def _hash(entry: Path) -> bytes:
    """sha256 over name and content of a program: under another name it is another program. Counts as no use of it."""
    with open(entry, "rb", opener=_open_without_use) as stream:
        return hashlib.file_digest(stream, lambda: hashlib.sha256(f"{entry.name}\n".encode())).digest()


def _open_without_use(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOATIME", 0))


def _seal_file(entry: Path) -> Path:
    return entry.with_name(entry.name + SEALS)


def _delete(entry: Path) -> None:
    entry.unlink(missing_ok=True)
    _seal_file(entry).unlink(missing_ok=True)


def _programs(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """The time of the last use (in seconds; of the writing, where reads are not recorded), bytes and file of each."""
    for entry in folder.glob(ENTRIES):
        with suppress(FileNotFoundError):  # another process made room at the same time
            found = entry.stat()
            yield max(found.st_atime, found.st_mtime), found.st_size, entry


def _processor() -> str:
    """Twelve digits: a hash of the model and the features of the first processor."""
    said = [platform.machine()]
    try:
        with Path("/proc/cpuinfo").open() as lines:
            first = takewhile(str.strip, lines)
            said += [line for line in first if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        pass  # not Linux: machines of one architecture are taken for equal
    return hashlib.sha256("".join(said).encode()).hexdigest()[:12]
