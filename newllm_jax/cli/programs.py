"""The folder of compiled programs: what one command compiled, the next ones find again."""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from itertools import takewhile
from pathlib import Path

from newllm_jax.errors import InputError
from newllm_jax.files import cache_folder

LARGEST = 2**30  # bytes of all programs
ENTRIES = "*-cache"  # JAX's name for a program


def program_folder() -> Path:
    """The folder for programs of this kind of processor, made where it is missing; too many, the oldest go.

    Machines that share a home may differ in what their processors can do, and what is compiled for one can crash on
    another.

    Raises:
      InputError: it is another user's, or others can write to it: they could make this user run any program.
      OSError: it can be neither found nor made.
    """
    folder = cache_folder() / f"programs-{_processor()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(f"{folder} is another user's or others can write to it: compiled programs are not kept there")
    newest_first = sorted(((entry.stat(), entry) for entry in folder.glob(ENTRIES)), key=lambda pair: -pair[0].st_mtime)
    total = 0
    for status, entry in newest_first:
        total += status.st_size
        if total > LARGEST:
            entry.unlink(missing_ok=True)
    return folder


def forget_programs(folder: Path) -> None:
    """Deletes all programs, of which one is damaged: JAX would never replace it."""
    for entry in folder.glob(ENTRIES):
        entry.unlink(missing_ok=True)


def _processor() -> str:
    """Twelve digits that stand for what the first processor says of its kind."""
    said = [platform.machine()]
    try:
        with Path("/proc/cpuinfo").open() as lines:
            first = takewhile(str.strip, lines)
            said += [line for line in first if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        pass  # not Linux: machines of one architecture are taken for equal
    return hashlib.sha256("".join(said).encode()).hexdigest()[:12]
