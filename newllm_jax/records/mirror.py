"""A copy of a run directory in a second place, Drive for instance, brought up to date while the run goes on.

Each file, and each checkpoint as one, is copied under another name, read back, and gets its own name only if it is what
was read. The copy may be all that is left of a run, so it loses nothing to a run that has less:

* Nothing is written where something else lies, or the copy of a run that has come further.
* A checkpoint that is there is replaced only by one that was written later: another content of the same age is damage.
* A checkpoint is deleted only when the run has a later one, or when the run had it in this process and deleted it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

from newllm_jax.config import expanded
from newllm_jax.errors import InputError
from newllm_jax.files import naming, read_json
from newllm_jax.records.progress import Narrate, boxed

IDENTITY = "config.json", "checkpoints/config.json"  # tell whose a copy is, so they are copied first
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
          run: a directory that has its `config.json` already.
          took: told how many seconds each update took.

        Raises:
          InputError: the folder lies in the run directory, or has in the place of the copy something else than a copy
            of this run, or a copy of it that has come further.
        """
        self._run, self._narrate, self._took = run, narrate, took
        self._copy = _copy_of(run, folder) if folder else run
        place, own = self._copy.resolve(), run.resolve()
        if place != own and place.is_relative_to(own):
            raise InputError(f"mirror: {folder} lies in {run}, which is to be copied there")
        if place != own:
            _check_place(run, self._copy)
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
    if not folder or run.exists():
        return
    copy = _copy_of(run, folder)
    if not any((copy / name).is_file() for name in IDENTITY):
        return
    partial = run.parent / f".{copy.name}{PARTIAL}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        copy_run(copy, partial)
        partial.rename(run)
    except OSError as error:
        raise InputError(f"mirror: {copy} cannot be copied to {run} ({error})") from error


def copy_run(run: Path, copy: Path, copied: Stamps | None = None) -> None:
    """Makes `copy` what `run` is, but for what the copy must not lose: see the top of this file.

    Args:
      copied: what is known to be copied; brought up to date.

    Raises:
      OSError: a file cannot be copied, or is not what was written when it is read back; in the place of the copy is
        something else, or there is a link in it; a checkpoint differs from the copy, and is not later.
    """
    copied = Stamps() if copied is None else copied
    if _is_foreign(run, copy):
        raise OSError(f"{copy} is there, and is no copy of this run")
    for path in (copy, *copy.rglob("*")):
        if path.is_symlink():
            raise OSError(f"{path} is a link, and a mirror is written into its own folder only")
    partial = copy / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    found, damaged = _stamps(run), list[str]()
    for unit in sorted(found, key=_rank):
        is_there = (copy / unit).exists()
        if is_there and copied.get(unit) == found[unit]:
            continue
        try:
            if not is_there or _digests(run / unit) != _digests(copy / unit):
                if is_there and _is_checkpoint(unit) and unit not in copied and not _is_later(run / unit, copy / unit):
                    damaged.append(unit.as_posix())
                    continue
                _copy_unit(run / unit, copy / unit, partial)
            copied[unit] = found[unit]
        except FileNotFoundError:
            if (run / unit).exists():  # else the run deleted it meanwhile
                raise
    furthest = _furthest(found)
    for unit in set(_units(copy)) - set(found):
        if unit in copied or not _is_checkpoint(unit) or _progress(unit) < furthest.get(_training(unit), (0, 0)):
            _remove(copy / unit, partial)
            copied.pop(unit, None)
    if damaged:
        raise OSError(f"{', '.join(damaged)} differs from its copy and is not later: one of the two is damaged")
    for folder in sorted((path for path in copy.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def _copy_of(run: Path, folder: str) -> Path:
    """Where the copy of a run lies: under the name that its directory really has, which "." and ".." hide."""
    name = run.resolve().name
    if not name:
        raise InputError(f"mirror: {run} has no name that its copy could have")
    return expanded("mirror", folder) / name


def _check_place(run: Path, copy: Path) -> None:
    """Raises InputError where the copy of a run cannot be made without losing what is there."""
    if _is_foreign(run, copy):
        raise InputError(f"mirror: {copy} is there, and is no copy of this run; move it away, or choose another folder")
    ours = _furthest(_units(run))
    ahead = [place for folder, place in _furthest(_units(copy)).items() if place > ours.get(folder, (0, 0))]
    if ahead and _lines(copy / "metrics.jsonl") > _lines(run / "metrics.jsonl"):  # else damage or a finished training
        raise InputError(
            f"mirror: {copy} has come further than {run}, to epoch {max(ahead)[0]}; move the latter away to go on from "
            "the former, or the former to make another copy"
        )


def _is_foreign(run: Path, copy: Path) -> bool:
    """Whether in the place of a copy lies something that is no copy of this run."""
    identity = _run_id(copy)
    if identity is None:
        return copy.exists() and (not copy.is_dir() or any(path.name != PARTIAL for path in copy.iterdir()))
    return identity != _run_id(run)


def _is_checkpoint(unit: Path) -> bool:
    return unit.name.startswith("epoch_")


def _is_later(unit: Path, copy: Path) -> bool:
    """Whether a checkpoint was written after its copy: the run went back and trained this epoch again."""
    own, copied = ([path.stat().st_mtime_ns for path in _files(each).values()] for each in (unit, copy))
    return not copied or max(own, default=0) > min(copied)


def _progress(unit: Path) -> tuple[int, float]:
    """How far a checkpoint has come: its epoch, and within it the update, infinity where the epoch is whole."""
    name = re.match(r"epoch_(\d{1,18})(?:_update_(\d{1,18}))?", unit.name)
    return (int(name[1]), float(name[2] or "inf")) if name else (0, 0)


def _training(unit: Path) -> Path:
    """The folder of a checkpoint's training; those within epochs lie a folder below."""
    return unit.parent.parent if unit.parent.name == "within_epoch" else unit.parent


def _furthest(units: Iterable[Path]) -> dict[Path, tuple[int, float]]:
    """How far each training has come, by its folder."""
    furthest = dict[Path, tuple[int, float]]()
    for unit in filter(_is_checkpoint, units):
        folder = _training(unit)
        furthest[folder] = max(_progress(unit), furthest.get(folder, (0, 0)))
    return furthest


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


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
        checkpoints = [name for name in names if _is_checkpoint(Path(name))]
        yield from (Path(folder, name).relative_to(run) for name in (*files, *checkpoints))
        names[:] = [name for name in names if name not in checkpoints]


def _rank(unit: Path) -> tuple[int, list[tuple[int, str]]]:
    """The order of copying. An epoch comes after those before it, so that what a checkpoint needs is always there."""
    first = unit.as_posix() in IDENTITY
    place = 0 if first else 3 if unit.name in LAST else 2 if _is_checkpoint(unit) else 1
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
    for name in IDENTITY:
        with suppress(InputError, AttributeError):
            return str(read_json(run / name).get("run_id", ""))
    return None
