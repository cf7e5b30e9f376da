"""The units of a run directory, its files and (as one each) its checkpoints: which there are, and copies of them.

A unit is copied under another name, read back, and gets its own name only if it is what was read.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from newllm_jax.files import naming

IDENTITY = "config.json", "checkpoints/config.json"  # tell whose a copy is, so they are copied first
LAST = ("results.json", "curves.png", "report.html", "report.md")  # a run that has them is finished
PIECE = 2**20  # bytes

Stamps = dict[Path, dict[str, tuple[int, int]]]  # of units, by their paths in the run directory


def is_checkpoint(unit: Path) -> bool:
    return unit.name.startswith("epoch_")


def progress_of(unit: Path) -> tuple[int, float]:
    """How far a checkpoint has come: its epoch, and within it the update, infinity where the epoch is whole."""
    name = re.match(r"epoch_(\d{1,18})(?:_update_(\d{1,18}))?", unit.name)
    return (int(name[1]), float(name[2] or "inf")) if name else (0, 0)


def training_of(unit: Path) -> Path:
    """The folder of a checkpoint's training; those within epochs lie a folder below."""
    return unit.parent.parent if unit.parent.name == "within_epoch" else unit.parent


def furthest_of(units: Iterable[Path]) -> dict[Path, tuple[int, float]]:
    """How far each training has come, by its folder."""
    furthest = dict[Path, tuple[int, float]]()
    for unit in filter(is_checkpoint, units):
        folder = training_of(unit)
        furthest[folder] = max(progress_of(unit), furthest.get(folder, (0, 0)))
    return furthest


def units_of(run: Path) -> Iterator[Path]:
    """The files of a run directory and, as one each, its checkpoints, by their paths in it.

    Temporary ones are none, and links are not followed.
    """
    for folder, names, files in _walk(run):
        names[:], files = (
            [
                name
                for name in each
                if not (name.startswith(".") or ".orbax-checkpoint-tmp" in name or Path(folder, name).is_symlink())
            ]
            for each in (names, files)
        )
        checkpoints = [name for name in names if is_checkpoint(Path(name))]
        yield from (Path(folder, name).relative_to(run) for name in (*files, *checkpoints))
        names[:] = [name for name in names if name not in checkpoints]


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, for which a folder that cannot be read is empty. Here only one that vanishes meanwhile is."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    return os.walk(folder, onerror=refuse)


def copying_rank(unit: Path) -> tuple[int, list[tuple[int, str]]]:
    """The order of copying. An epoch comes after those before it, so that what a checkpoint needs is always there."""
    name = unit.as_posix()
    if name in IDENTITY:
        return IDENTITY.index(name) - len(IDENTITY), []
    place = 2 if unit.name in LAST else 1 if is_checkpoint(unit) else 0
    numbers = [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]
    return place, numbers


def _files(unit: Path) -> dict[str, Path]:
    """The files of a unit by their paths in it; "" for a file."""
    if unit.is_file():
        return {"": unit}
    paths = (Path(folder, name) for folder, _, names in _walk(unit) for name in names)
    return {path.relative_to(unit).as_posix(): path for path in paths}


def stamps_of(run: Path) -> Stamps:
    """Sizes and times of change of the files of a run's units."""
    stamps = Stamps()
    for unit in units_of(run):
        try:
            found = {name: path.stat() for name, path in _files(run / unit).items()}
        except FileNotFoundError:
            continue  # deleted meanwhile
        stamps[unit] = {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}
    return stamps


def digests_of(unit: Path) -> dict[str, str]:
    """The sha256 of each file of a unit, by its path in it."""
    return {name: _sha256(path) for name, path in _files(unit).items()}


def copy_unit(source: Path, target: Path, partial: Path) -> None:
    """Copies a unit to `target` by way of the folder `partial`. Raises OSError; FileNotFoundError where it vanishes."""
    new = partial / target.name
    try:
        for name, path in _files(source).items():
            _copy_file(path, new / name if name else new)
        if target.is_dir():
            remove_unit(target, partial)
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


def remove_unit(unit: Path, partial: Path) -> None:
    """Takes a unit's name first: a deletion that is cut short leaves nothing that looks like a checkpoint."""
    partial.mkdir(parents=True, exist_ok=True)
    doomed = partial / f"deleted-{unit.name}"
    unit.rename(doomed)
    shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
