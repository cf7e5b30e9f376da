"""The folder of compiled programs: what one command compiles, the next ones read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from newllm_jax.errors import InputError
from newllm_jax.files import cache_folder

# JAX has a limit of its own, `jax_compilation_cache_max_size`, which would be worse. It keeps the time of the last use
# of a program in a second file, and reads all of these before it writes a program (28 ms where there are 1000). Where
# one is missing, because a process was killed between the two writes or ran without the limit, no program is written
# any more. And it holds a lock, for which others wait up to 10 s, around every read and write.
LARGEST = 2**30  # bytes of all programs
ENTRIES = "*-cache"  # JAX's name for a program


def program_folder() -> Path:
    """The folder for programs of this kind of processor. Makes it if it is missing, and keeps it below the size limit.

    The programs that were not used for longest are deleted first. Machines that share a home may differ in what their
    processors can do, and what is compiled for one can crash on another.

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
    size = 0
    for _, entry_size, entry in sorted(_programs(folder), reverse=True):
        size += entry_size
        if size > LARGEST:
            entry.unlink(missing_ok=True)
    return folder


def forget_programs(folder: Path) -> None:
    """Deletes all programs, because one of them is damaged and JAX would never replace it."""
    for entry in folder.glob(ENTRIES):
        entry.unlink(missing_ok=True)


def _programs(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """The time of the last use (in seconds; of the writing, where reads are not recorded), bytes and file of each."""
    for entry in folder.glob(ENTRIES):
        with contextlib.suppress(FileNotFoundError):  # another process made room at the same time
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
