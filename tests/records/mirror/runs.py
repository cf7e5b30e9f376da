"""Runs whose mirrors the tests of this folder look at."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from newllm_jax.content import sealed
from newllm_jax.files import read_json
from newllm_jax.records import mirror
from newllm_jax.records.directory import RunDir
from newllm_jax.records.mirror import Known, Mirror


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def write_epoch(run: Path, epoch: int, text: str = "", folder: str = "checkpoints") -> None:
    checkpoint = run / folder / f"epoch_{epoch}"
    write(checkpoint / "manifest" / "metadata", json.dumps(sealed({"epoch": epoch, "text": text})))
    write(checkpoint / "params" / "d" / "0", f"{epoch} {text}")


def epochs(run: Path, folder: str = "checkpoints") -> list[str]:
    return sorted(
        path.name.removeprefix("epoch_") for path in (run / folder).glob("epoch_*") if "-tmp" not in path.name
    )


def begun(run: Path) -> RunDir:
    """A run as its process finds it."""
    file = run / "config.json"
    return RunDir(run, read_json(file) if file.exists() else {})


def known(run: Path) -> Known:
    """What a process knows that has just found a run."""
    return Known(mirror.stamps_of(run))


def content(folder: Path) -> dict[str, str]:
    """What counts in a run directory."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = {path.relative_to(folder).as_posix(): path.read_text() for path in files}
    return {name: text for name, text in texts.items() if not name.startswith(".") and "-tmp" not in name}


class Followed(Mirror):
    """A mirror that remembers what it told, and lets a test wait for its next update."""

    def __init__(self, run, folder):
        self.told, self.updates = [], threading.Semaphore(0)
        super().__init__(begun(run), str(folder), self.told.append, lambda seconds: self.updates.release())
        self.start()

    def wait(self):
        assert self.updates.acquire(timeout=30)


def follow(run: Path, folder: Path) -> None:
    """A process that finds a run, copies it, and ends."""
    with Mirror(begun(run), str(folder), lambda _: None, lambda _: None) as following:
        following.start()
