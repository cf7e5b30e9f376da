"""What a run records of the machine: versions, device, the command, the most memory in use; and what memory is free."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
    if program.name == "__main__.py":
        start = ["newllm"]  # `python -m newllm_jax`, whose file lies wherever the package does
    else:
        start = ["python", program.as_posix()] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def peak_memory_bytes() -> int:
    """The most memory in use so far: of the device where it says so, else of this process."""
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
