"""What a run records of the machine: versions, device, the command, the most memory in use; and what memory is free."""

from __future__ import annotations

import contextlib
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

USABLE_SHARE = 0.9  # of the free memory; a plan is an estimate
REPORTED_PACKAGES = ("newllm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment(precision: str) -> dict[str, Any]:
    """Versions, device and precision, as `results.json` has them."""
    import jax

    device = jax.devices()[0]
    versions: dict[str, str] = {}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # run from a checkout that is not installed
    return {
        "python": platform.python_version(),
        **versions,
        "platform": device.platform,
        "device": device.device_kind,
        "precision": precision,
    }


def command_line() -> str:
    """The command that this process was started with."""
    program = Path(sys.argv[0])
    start = ["python", program.as_posix()] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def peak_memory_bytes() -> int:
    """The most memory in use so far: of the device where it says so, else of this process."""
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_device_memory() -> int | None:
    """Bytes that the device can still give: of a CPU, those of the machine; None where that is not known."""
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"]) - int(statistics["bytes_in_use"])
    return free_host_memory() if jax.devices()[0].platform == "cpu" else None


def usable_memory() -> int | None:
    """Bytes that a run may be planned to need, a tenth of what is free left alone; None where that is not known.

    On a CPU with what this process has by now, which the plans of runs count.
    """
    import jax

    free = free_device_memory()
    held = peak_memory_bytes() if jax.devices()[0].platform == "cpu" else 0
    return None if free is None else held + int(USABLE_SHARE * free)


def free_host_memory() -> int | None:
    """Bytes that the machine can still give, within the limit of the container; None where it does not say (no Linux).

    Pages of files that the system keeps in memory count as free.
    """
    try:
        available = _number_after("MemAvailable:", Path("/proc/meminfo")) * 1024
    except (OSError, StopIteration):
        return None
    container = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, StopIteration, ValueError):  # no container, or one without a limit ("max")
        limit = int((container / "memory.max").read_text())
        available = min(available, max(limit - _number_after("anon", container / "memory.stat"), 0))
    return available


def _number_after(name: str, file: Path) -> int:
    """The number behind a name at the start of a line."""
    words = next(words for words in map(str.split, file.read_text().splitlines()) if words[0] == name)
    return int(words[1])
