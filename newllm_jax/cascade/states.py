"""Hidden states in files: written in order, memory-mapped once they are whole, and out of memory again once read.

A million rows of Alpaca are more hidden states than any memory holds. What is read of a mapped file is the system's to
keep or to drop, and no part of the memory that a run must have.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from newllm_jax.files import cache_folder, naming

NUMBER = np.dtype(np.float32)
SMALL = 2**28  # bytes of hidden states that commands which leave nothing behind keep in memory


class States:
    """Hidden states `[tokens, H]` float32 that are written one block after the other.

    In a folder they are a file without a name: it vanishes with the last array that reads it, or with the process,
    whatever ends that. Without a folder they are in memory.

    Attributes:
      width: H.
      rows: how many tokens were written.
    """

    def __init__(self, width: int, folder: Path | None = None) -> None:
        """Raises OSError, naming the folder, where no file can be made in it."""
        self.width, self.rows, self._folder = width, 0, folder
        self._blocks, self._file = list[np.ndarray](), None
        if folder is not None:
            with naming(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115

    def append(self, block: np.ndarray) -> None:
        """Writes the next tokens. Raises OSError, naming the folder, where the disk takes no more."""
        self.rows += len(block)
        if self._file is None or self._folder is None:
            self._blocks.append(block)
            return
        with naming(self._folder):
            write_all(self._file, block)

    def array(self) -> np.ndarray:
        """All that was written, `[tokens, H]`; nothing is written afterwards."""
        if self._file is None:
            return np.concatenate(self._blocks) if self._blocks else np.zeros((0, self.width), NUMBER)
        with self._file as file:
            return map_states(file, self.rows, self.width)


def map_states(file: BinaryIO | Path, rows: int, width: int) -> np.ndarray:
    """The first `rows` hidden states of a file, `[rows, H]` float32, read where they are looked at.

    Raises:
      OSError, ValueError: a file that cannot be read, or has fewer.
    """
    if not rows:
        return np.zeros((0, width), NUMBER)
    return np.memmap(cast(BinaryIO, file), NUMBER, "r", shape=(rows, width))


def write_all(file: BinaryIO, block: np.ndarray) -> None:
    """Writes an array from where the file stands; an unbuffered file may take a part of it at a time."""
    left = np.ascontiguousarray(block, NUMBER).data.cast("B") if block.size else memoryview(b"")
    while left:
        left = left[file.write(left) :]


def release(array: np.ndarray) -> None:
    """Gives back the memory that holds what was read of a mapped file; the next look reads it again.

    Does nothing to an array in memory.
    """
    owner: object = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = getattr(owner, "base", None)
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def spare_folder(tokens: int, width: int) -> Path | None:
    """Where a command that leaves nothing behind has its hidden states: the cache folder, or memory for few."""
    return cache_folder() if tokens * width * NUMBER.itemsize > SMALL else None
