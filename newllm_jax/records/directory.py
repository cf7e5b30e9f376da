"""The directory that a run leaves behind: who may write it, and how its files are written so that none is ever half."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from newllm_jax.config import check, checked, checked_path
from newllm_jax.errors import InputError
from newllm_jax.files import naming, whole_file

LONGEST_NAME = 200  # the time and a number follow it, and file systems end at 255
WANDB = "wandb"  # the folder of that tracker


class RunDir:
    """A run directory, held by one process at a time. Use it as a context.

    It is a run from its `config.json` on: a new directory that is left without one vanishes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock", timeout=0)
        self._is_new = False

    @classmethod
    def create(cls, root: str | Path, name: str) -> Self:
        """Makes `root/name-time`; a second run of the same second gets a number of its own.

        Raises:
          InputError: `name` is no plain file name, or a path that cannot be.
        """
        root, name = checked_path("run_root", root), checked("name", name, str)
        check("name", name, f"a file name of 1 to {LONGEST_NAME} bytes, without folders",
              name == Path(name).name and 1 <= len(name.encode()) <= LONGEST_NAME)  # fmt: skip
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1, 1000):
            path = root / f"{name}-{stamp}{f'-{attempt}' if attempt > 1 else ''}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            run = cls(path)
            run._is_new = True
            return run
        raise InputError(f"run_root: no free name for a run in {root}")

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing run directory.

        Raises:
          InputError: it does not exist or is not a run directory.
        """
        path = checked_path("run_dir", path)
        if not path.is_dir():
            raise InputError(f"{path}: not a run directory" if path.exists() else f"{path}: no such run directory")
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: not a run directory (it has no config.json)")
        return cls(path)

    def __enter__(self) -> Self:
        self._check_links()
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InputError(f"{self.path}: in use by another running process") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new and not (self.path / "config.json").exists():
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def _check_links(self) -> None:
        """Raises InputError where something in the directory is a link: what a run writes would lie elsewhere."""
        for folder, folders, files in os.walk(self.path):
            if WANDB in folders:
                folders.remove(WANDB)  # its own links, and nothing that this library writes
            for path in (Path(folder, name) for name in (*folders, *files)):
                if path.is_symlink():
                    raise InputError(f"{path}: is a link, and a run writes into its own directory only; replace it by "
                                     "what it points to")  # fmt: skip

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> Path:
        """Writes a text file, whole or not at all; returns its path."""
        path = self.path / name
        with whole_file(path) as partial:
            partial.write_text(content, encoding="utf-8")
        return path

    def read_json(self, name: str) -> Any:
        """Reads a JSON file of the run.

        Raises:
          InputError: it is missing or damaged.
        """
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: has no {name}") from error
        except ValueError as error:
            raise InputError(f"{self.path / name}: damaged ({error})") from error

    def write_metrics(self, entries: Iterable[dict[str, Any]]) -> None:
        """Rewrites `metrics.jsonl`: after a stop it may be ahead of the checkpoint that is resumed."""
        self.write_text("metrics.jsonl", "".join(json.dumps(_finite(entry)) + "\n" for entry in entries))

    def append_metrics(self, entry: dict[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`."""
        path, line = self.path / "metrics.jsonl", json.dumps(_finite(entry)).encode() + b"\n"
        with naming(path), path.open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                if stream.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                stream.truncate(size)  # no half line
                raise


def _finite(content: Any) -> Any:
    """JSON has no infinity: a perplexity that overflows is null."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
