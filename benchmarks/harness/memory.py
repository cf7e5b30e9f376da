"""The most memory that a process needed. JAX is imported only where the library is measured."""

from __future__ import annotations

import resource
import sys
from typing import Any


def jax_memory() -> dict[str, Any]:
    """Of JAX's allocator on the device where it counts, else of the process."""
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return {"peak_memory_bytes": int(statistics["peak_bytes_in_use"]), "peak_memory_of": "device"}
    return process_memory()


def process_memory() -> dict[str, Any]:
    """Of the process, libraries and all."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024), "peak_memory_of": "process"}
