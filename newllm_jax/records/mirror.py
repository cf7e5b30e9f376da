"""A copy of a run directory in a second place, Drive for instance, brought up to date while the run goes on.

Each file, and each checkpoint as one, is copied under another name, read back, and gets its own name only if it is what
was read. What the run deletes is deleted in the copy too, after what is new is there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from newllm_jax.errors import InputError
from newllm_jax.files import naming, read_json
from newllm_jax.records.progress import Narrate, boxed

PARTIAL = ".mirror"  # the folder of what is being copied; files with such names are no part of a run
LAST = ("results.json", "curves.png", "report.md")  # a run that has them is finished
PIECE = 2**20  # bytes
SECONDS = 10.0  # between looks at what is new

Stamps = dict[Path, dict[str, tuple[int, int]]]  # of units, by their paths in the run directory


class Mirror:
    """Keeps a copy of a run directory up to date, in a thread. Use it as a context: leaving waits for the last of it.

    An error stops nothing: it is told once, and the next change of the run is another attempt.
    """

    def __init__(self, run: Path, folder: str, narrate: Narrate, took: Callable[[float], None]) -> None:
        """Copies nothing where `folder`, the parent of the copy, is "" or that of the run itself.

        Args:
          took: told how many seconds each update took.

        Raises:
          InputError: the folder lies in the run directory.
        """
        self._run, self._narrate, self._took = run, narrate, took
        self._copy = Path(folder).expanduser() / run.name if folder else run
        place, own = self._copy.resolve(), run.resolve()
        if place != own and place.is_relative_to(own):
            raise InputError(f"mirror: {folder} lies in {run}, which is to be copied there")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True) if place != own else None

    def __enter__(self) -> Self:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._over.set()
            self._thread.join()

    def _follow(self) -> None:
        copied, seen, complained, over = Stamps(), Stamps(), False, False
        while not over:
            over = self._over.wait(SECONDS)  # before the last look, which then sees all that the run did
            started = time.monotonic()
            try:
                found = _stamps(self._run)
                if found == seen and not over:
                    continue
                seen = found
                copy_run(self._run, self._copy, copied)
            except Exception as error:  # whatever it is: the run goes on
                if over or not complained:
                    self._narrate(boxed(f"mirror: {self._copy} is not up to date ({error}); the run goes on"))
                complained = True
            self._took(time.monotonic() - started)


def fetch_run(run: Path, folder: str) -> None:
    """Copies a run back from its mirror, where there is nothing in `run`; does nothing where there is no copy.

    Args:
      folder: the parent of the copy; "" for none.

    Raises:
      InputError: the copy cannot be read, or `run` not be written.
    """
    copy = Path(folder).expanduser() / run.name
    if not folder or run.exists() or not (copy / "config.json").is_file():
        return
    partial = run.parent / f".{run.name}{PARTIAL}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        copy_run(copy, partial)
        partial.rename(run)
    except OSError as error:
        raise InputError(f"mirror: {copy} cannot be copied to {run} ({error})") from error


def copy_run(run: Path, copy: Path, copied: Stamps | None = None) -> None:
    """Makes `copy` what `run` is.

    Args:
      copied: what is known to be copied; brought up to date.

    Raises:
      OSError: a file cannot be copied, or is not what was written when it is read back; `copy` is another run's, or
        there is a link in it.
    """
    copied = Stamps() if copied is None else copied
    if _run_id(copy) not in (None, _run_id(run)):
        raise OSError(f"{copy} is the copy of another run")
    for path in (copy, *copy.rglob("*")):
        if path.is_symlink():
            raise OSError(f"{path} is a link, and a mirror is written into its own folder only")
    partial = copy / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    found = _stamps(run)
    for unit in sorted(found, key=_rank):
        is_there = (copy / unit).exists()
        if is_there and copied.get(unit) == found[unit]:
            continue
        try:
            if not is_there or _digests(run / unit) != _digests(copy / unit):
                _copy_unit(run / unit, copy / unit, partial)
            copied[unit] = found[unit]
        except FileNotFoundError:
            if (run / unit).exists():  # else the run deleted it meanwhile
                raise
    for unit in set(_units(copy)) - set(found):
        _remove(copy / unit, partial)
    for folder in sorted((path for path in copy.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def _units(run: Path) -> Iterator[Path]:
    """The files of a run directory and, as one each, its checkpoints, by their paths in it.

    Temporary ones are none, and links are not followed.
    """
    for folder, names, files in os.walk(run):  # what vanishes meanwhile is passed over
        names[:], files = (
            [
                name
                for name in each
                if not (name.startswith(".") or ".orbax-checkpoint-tmp" in name or Path(folder, name).is_symlink())
            ]
            for each in (names, files)
        )
        units = [*files, *(name for name in names if name.startswith("epoch_"))]
        yield from (Path(folder, name).relative_to(run) for name in units)
        names[:] = [name for name in names if not name.startswith("epoch_")]


def _rank(unit: Path) -> tuple[int, list[tuple[int, str]]]:
    """The order of copying. An epoch comes after those before it, so that what a checkpoint needs is always there."""
    place = 2 if unit.name in LAST else 1 if unit.name.startswith("epoch_") else 0
    numbers = [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", unit.as_posix())]
    return place, numbers


def _files(unit: Path) -> dict[str, Path]:
    """The files of a unit by their paths in it; "" for a file."""
    if unit.is_file():
        return {"": unit}
    paths = (Path(folder, name) for folder, _, names in os.walk(unit) for name in names)
    return {path.relative_to(unit).as_posix(): path for path in paths}


def _stamps(run: Path) -> Stamps:
    """Sizes and times of change of the files of a run's units."""
    stamps = Stamps()
    for unit in _units(run):
        try:
            found = {name: path.stat() for name, path in _files(run / unit).items()}
        except FileNotFoundError:
            continue  # deleted meanwhile
        stamps[unit] = {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}
    return stamps


def _digests(unit: Path) -> dict[str, str]:
    return {name: _sha256(path) for name, path in _files(unit).items()}


def _copy_unit(source: Path, target: Path, partial: Path) -> None:
    """Copies a unit to `target` by way of the folder `partial`. Raises OSError; FileNotFoundError where it vanishes."""
    new = partial / target.name
    try:
        for name, path in _files(source).items():
            _copy_file(path, new / name if name else new)
        if target.is_dir():
            _remove(target, partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        new.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with naming(target), source.open("rb") as read, target.open("wb") as written:
        while piece := read.read(PIECE):
            digest.update(piece)
            written.write(piece)
        written.flush()
        os.fsync(written.fileno())
    if _sha256(target) != digest.hexdigest():
        raise OSError(f"{target}: read back, it is not what was written")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(unit: Path, partial: Path) -> None:
    """Takes a unit's name first: a deletion that is cut short leaves nothing that looks like a checkpoint."""
    partial.mkdir(parents=True, exist_ok=True)
    doomed = partial / f"deleted-{unit.name}"
    unit.rename(doomed)
    shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()


def _run_id(run: Path) -> str | None:
    """The identity of a run; None where there is none, "" for one of version 0.1.0."""
    try:
        return read_json(run / "config.json").get("run_id", "")
    except (InputError, AttributeError):
        return None
