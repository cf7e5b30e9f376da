"""A copy of a run directory in a second place, Drive for instance, brought up to date while the run goes on.

The copy may be all that is left of a run, so it loses nothing to a run that has less:

* Nothing is written where something else lies, or a copy that has come further than the run.
* A checkpoint is replaced only by one with another manifest that is whole: a damaged one keeps the manifest it had.
* A checkpoint is deleted only where this process has added one to its training, or has seen the run delete it and keep
  a later one. Another file is deleted only if this process has seen it in the run.
* When a run ends well, with its results, the copy becomes what the run is.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from newllm_jax.config import expanded
from newllm_jax.content import check_seal
from newllm_jax.errors import InputError
from newllm_jax.files import read_json
from newllm_jax.processes import is_first
from newllm_jax.records.directory import RunDir
from newllm_jax.records.narration import Narrate, warn
from newllm_jax.records.units import (
    IDENTITY,
    LAST,
    Stamps,
    copy_unit,
    copying_rank,
    digests_of,
    furthest_of,
    is_checkpoint,
    progress_of,
    remove_unit,
    stamps_of,
    training_of,
    units_of,
)

MANIFEST = Path("manifest", "metadata")  # of a checkpoint
PARTIAL = ".mirror"  # the folder of what is being copied; files with such names are no part of a run
SECONDS = 10.0  # between looks at what is new


@dataclass
class Known:
    """What a process knows of a run and its copy.

    Attributes:
      first: the run as this process found it.
      copied: what is in the copy, by this process or as it was found there.
      is_finished: whether the run has ended well, with its results, for which it had to be whole.
    """

    first: Stamps = field(default_factory=Stamps)
    copied: Stamps = field(default_factory=Stamps)
    is_finished: bool = False


class Mirror:
    """Keeps a copy of a run directory up to date, in a thread, from `start` on.

    Use it as a context, around all that writes: leaving waits for the last of it. An error stops nothing: it is told
    once, and the next change of the run is another attempt.
    """

    def __init__(self, run: RunDir, folder: str, narrate: Narrate, took: Callable[[float], None]) -> None:
        """Copies nothing where `folder`, the parent of the copy, is "" or that of the run itself.

        Args:
          run: as it was found; what resuming deletes in it is still there.
          took: told how many seconds each update took.

        Raises:
          InputError: the folder lies in the run directory, or has in the place of the copy something else than a copy
            of this run, or a copy of it that has come further.
        """
        self._run, self._narrate, self._took = run.path, narrate, took
        self._copy = _copy_of(run.path, folder) if folder and is_first() else run.path
        self._over, self._thread = threading.Event(), None
        place, own = self._copy.resolve(), run.path.resolve()
        if place == own:
            return
        if place.is_relative_to(own):
            raise InputError(f"mirror: {folder} lies in {run.path}, which is to be copied there")
        _check_place(run, self._copy)
        self._known = Known(stamps_of(run.path))
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def start(self) -> None:
        """Begins to copy. By now the run has its `config.json`."""
        if self._thread:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread and self._thread.ident:
            self._known.is_finished = kind is None and (self._run / LAST[0]).is_file()
            self._over.set()
            self._thread.join()

    def _follow(self) -> None:
        seen, complained, over = Stamps(), False, False
        while not over:
            over = self._over.wait(SECONDS)  # before the last look, which then sees all that the run did
            started = time.monotonic()
            try:
                found = stamps_of(self._run)
                if found == seen and not over:
                    continue
                seen = found
                copy_run(self._run, self._copy, self._known)
            except Exception as error:  # whatever it is: the run goes on
                if over or not complained:
                    warn(self._narrate, f"mirror: {self._copy} is not up to date ({error}); the run goes on")
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


def copy_run(run: Path, copy: Path, known: Known | None = None) -> None:
    """Makes `copy` what `run` is, but for what the copy must not lose: see the top of this file.

    Args:
      known: brought up to date.

    Raises:
      OSError: a file cannot be copied, or is not what was written when it is read back; in the place of the copy is
        something else, or there is a link in it; a checkpoint is damaged, here or there.
    """
    known = known or Known()
    if _is_foreign(copy, _owner(run)):
        raise OSError(f"{copy} is there, and is no copy of this run")
    for path in (copy, *copy.rglob("*")):
        if path.is_symlink():
            raise OSError(f"{path} is a link, and a mirror is written into its own folder only")
    partial = copy / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    found, damaged = stamps_of(run), list[str]()
    for unit in sorted(found, key=copying_rank):
        is_there = (copy / unit).exists()
        if is_there and known.copied.get(unit) == found[unit]:
            continue
        try:
            if not is_there or digests_of(run / unit) != digests_of(copy / unit):
                if is_there and is_checkpoint(unit) and not _is_another(run / unit, copy / unit):
                    damaged.append(unit.as_posix())
                    continue
                copy_unit(run / unit, copy / unit, partial)
            known.copied[unit] = found[unit]
        except FileNotFoundError:
            if (run / unit).exists():  # else the run deleted it meanwhile
                raise
    for unit in set(units_of(copy)) - set(found):
        if _is_given_up(unit, found, known):
            remove_unit(copy / unit, partial)
            known.copied.pop(unit, None)
    for folder in sorted((path for path in copy.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    if damaged:
        raise OSError(f"{', '.join(damaged)}: the checkpoint or its copy is damaged, and neither replaces the other; "
                      "delete the damaged one")  # fmt: skip


def _is_given_up(unit: Path, found: Stamps, known: Known) -> bool:
    """Whether the run deleted a unit of the copy, and did not only lose it; see the top of this file."""
    if known.is_finished:
        return True
    was_seen = unit in known.first or unit in known.copied
    if not is_checkpoint(unit):
        return was_seen
    siblings = [other for other in found if is_checkpoint(other) and training_of(other) == training_of(unit)]
    has_later = any(progress_of(other) > progress_of(unit) for other in siblings)
    has_new = any(found[other] != known.first.get(other) for other in siblings)
    return has_new or (has_later and was_seen)


def _copy_of(run: Path, folder: str) -> Path:
    """Where the copy of a run lies: under the name that its directory really has, which "." and ".." hide."""
    name = run.resolve().name
    if not name:
        raise InputError(f"mirror: {run} has no name that its copy could have")
    return expanded("mirror", folder) / name


def _check_place(run: RunDir, copy: Path) -> None:
    """Raises InputError where the copy of a run cannot be made without losing what is there."""
    owner = run.run_id, run.description.get("system", "")
    if _is_foreign(copy, owner) or (not run.run_id and _description(copy) not in (None, run.description)):
        raise InputError(f"mirror: {copy} is there, and is no copy of this run; move it away, or choose another folder")
    ours, theirs = (furthest_of(units_of(path)) for path in (run.path, copy))
    ahead = [place for folder, place in theirs.items() if place > ours.get(folder, (0, 0))]
    if ahead:
        raise InputError(
            f"mirror: {copy} has come further than {run.path} (to epoch {max(ahead)[0]}); move the latter away to go "
            "on from the former, or the former to make another copy"
        )


def _owner(run: Path) -> tuple[str, str] | None:
    """The identity and system of a run; None where there is none. The identity is "" for one of version 0.1.0."""
    found = _description(run)
    return None if found is None else (str(found.get("run_id", "")), str(found.get("system", "")))


def _description(run: Path) -> dict[str, Any] | None:
    """The content of `config.json`, or of its copy; None where neither is an object."""
    for name in IDENTITY:
        with suppress(InputError):
            content = read_json(run / name)
            if isinstance(content, dict):
                return content
    return None


def _is_foreign(copy: Path, owner: tuple[str, str] | None) -> bool:
    """Whether in the place of a copy lies something that is no copy of the owner's run."""
    there = _owner(copy)
    if there is None:
        return copy.exists() and (not copy.is_dir() or any(units_of(copy)))
    return there != owner


def _is_another(unit: Path, copy: Path) -> bool:
    """Whether a checkpoint is whole, by its manifest, and another than its copy: the run trained this epoch again."""
    manifest = unit / MANIFEST
    try:
        check_seal(read_json(manifest), required=True)
        return not (copy / MANIFEST).is_file() or manifest.read_bytes() != (copy / MANIFEST).read_bytes()
    except (ValueError, OSError):  # InputError is the former
        return False
