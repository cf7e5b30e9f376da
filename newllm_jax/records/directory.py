"""The directory that a run leaves behind: who may write it, and how its files are written so that none is ever half."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from newllm_jax.config import check, checked, checked_path
from newllm_jax.content import check_seal, finite, json_sha256, sealed
from newllm_jax.errors import InputError, Note
from newllm_jax.files import LARGEST_JSON, naming, read_json, whole_file
from newllm_jax.processes import agree, is_first

EXPORTED = "newllm.json"  # makes a folder an exported model, see `exported.py`
COPY = "checkpoints/config.json"  # a run whose settings are lost could not go on

LONGEST_NAME = 200  # the time and a number follow it, and file systems end at 255
WANDB = "wandb"  # the folder of that tracker


class RunDir:
    """A run directory, held by one process at a time. Use it as a context.

    Of several processes that train together, the first one holds it and writes; what the others write goes nowhere.

    It is a run from its `config.json` on: a new directory that is left without one vanishes.

    Attributes:
      path: the directory.
      description: the content of `config.json`: settings, fingerprints, hashes of other files; {} for a new run.
      run_id: tells this run from any other, in every file that belongs to it; "" for a run of version 0.1.0.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self.path: Path = path
        self.description: dict[str, Any] = description
        self.run_id: str = description.get("run_id", "") if description else agree(uuid.uuid4().hex)
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
        run = cls(Path(agree(str(_new_folder(root, name) if is_first() else ""))), {})
        run._is_new = True
        return run

    @classmethod
    def open_or_create(cls, path: Path) -> Self:
        """The run of a directory, or a new one where it has none yet."""
        if any((path / name).is_file() for name in ("config.json", COPY)):
            return cls.open(path)
        existed = path.exists()
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, {})
        run._is_new = not existed
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing run directory.

        Raises:
          InputError: it does not exist or is not a run directory, or its `config.json` is damaged or gone, and so is
            the copy.
        """
        path = checked_path("run_dir", path)
        if not path.is_dir():
            raise InputError(f"{path}: not a run directory" if path.exists() else f"{path}: no such run directory")
        if (path / EXPORTED).is_file():
            raise InputError(f"{path}: an exported model, not a run directory; generate and evaluate read it")
        if not any((path / name).is_file() for name in ("config.json", COPY)):
            raise InputError(f"{path}: not a run directory (it has no config.json)")
        return cls(path, _read_description(path))

    def __enter__(self) -> Self:
        self._check_links()
        if not is_first():
            return self
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InputError(f"{self.path}: in use by another running process") from error
        return self

    def __exit__(self, *_: object) -> None:
        if not is_first():
            return
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

    def begin(self, description: dict[str, Any], files: Mapping[str, Any] = {}) -> None:
        """Writes `config.json`, which makes a directory a run, and a copy of it.

        Args:
          description: its content, but the identity of the run.
          files: the content of other JSON files that the run needs, by name.
        """
        for name, content in files.items():
            self.write_json(name, content)
        self.description = {**description, "run_id": self.run_id}
        self.write_json("config.json", self.description)
        self.write_json(COPY, self.description)

    def write_json(self, name: str, content: Any) -> Any:
        """Writes a JSON file, whole or not at all; an object with the hash of its content. Returns what it holds."""
        content = sealed(content) if isinstance(content, dict) else finite(content)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        if (size := len(text.encode())) > LARGEST_JSON:
            raise InputError(
                f"{self.path / name}: would have {size:,} bytes, and no more than {LARGEST_JSON:,} are read"
            )
        self.write_text(name, text)
        return content

    def write_text(self, name: str, content: str) -> Path:
        """Writes a text file, whole or not at all; returns its path."""
        path = self.path / name
        if is_first():
            with whole_file(path) as partial:
                partial.write_text(content, encoding="utf-8")
        return path

    def read_json(self, name: str) -> Any:
        """Reads a JSON file of the run.

        Raises:
          InputError: it is missing, damaged, or not what the run wrote.
        """
        path = self.path / name
        if not path.exists():
            raise InputError(f"{self.path}: has no {name}")
        content, written = read_sealed(path), self.description.get("files", {}).get(name)
        if written is not None and json_sha256(content) != written:
            again = f"--resume {self.path} writes it again"
            raise InputError(f"{path}: damaged, or changed after it was written; {again}")
        return content

    def write_metrics(self, entries: Iterable[dict[str, Any]]) -> None:
        """Rewrites `metrics.jsonl`: after a stop it may be ahead of the checkpoint that is resumed."""
        self.write_text("metrics.jsonl", "".join(json.dumps(finite(entry)) + "\n" for entry in entries))

    def append_metrics(self, entry: dict[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`."""
        if not is_first():
            return
        path, line = self.path / "metrics.jsonl", json.dumps(finite(entry)).encode() + b"\n"
        with naming(path), path.open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                if stream.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                stream.truncate(size)  # no half line
                raise


def _new_folder(root: Path, name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        path = root / f"{name}-{stamp}{f'-{attempt}' if attempt > 1 else ''}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise InputError(f"run_root: no free name for a run in {root}")


def read_sealed(path: Path) -> Any:
    """The content of a JSON file that `RunDir.write_json` wrote.

    Raises:
      InputError: it cannot be read, or its content is not what was written.
    """
    content = read_json(path)
    try:
        if isinstance(content, dict):
            check_seal(content, required=content.get("schema_version", 1) != 1)  # version 0.1.0 wrote no hash
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error})") from error
    return content


def _read_description(path: Path) -> dict[str, Any]:
    """The content of `config.json`, or of its copy where it is damaged or gone. Raises InputError."""
    try:
        return _object(path / "config.json")
    except InputError as error:
        try:
            copy = _object(path / COPY)
        except InputError:
            raise error from None
        warnings.warn(f"{error}; read {path / COPY} instead", Note, stacklevel=2)
        return copy


def _object(path: Path) -> dict[str, Any]:
    content = read_sealed(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged (a JSON object is expected)")
    return content
