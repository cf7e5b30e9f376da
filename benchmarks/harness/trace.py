"""The trace that JAX's profiler writes, read: kernels with their times, launches, and the time in which none runs."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_jax.errors import InputError


@dataclass(frozen=True)
class Kernel:
    """One interval of a trace, in microseconds."""

    name: str
    start: float
    duration: float


def read_trace(folder: Path) -> tuple[list[Kernel], str]:
    """The kernels of a GPU's streams; of a CPU, what its threads record.

    Raises:
      InputError: no trace, or nothing in it.
    """
    files = sorted(folder.rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise InputError(f"trace: JAX's profiler left no *.trace.json.gz in {folder}")
    with gzip.open(files[-1], "rt", encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    processes, threads = _labels(events)
    # On a GPU, lines such as "XLA Ops" repeat what the streams hold, so that only the streams are read.
    streams = {
        key for key, label in threads.items()
        if "/device:" in processes.get(key[0], "") and label.startswith("Stream")
    }  # fmt: skip
    lines = streams or {key for key in threads if "XLA" in threads[key] or "Eigen" in threads[key]}
    kernels = [
        Kernel(event["name"], float(event["ts"]), float(event.get("dur", 0)))
        for event in events
        if event.get("ph") == "X" and (event["pid"], event.get("tid")) in lines and "Thunk" not in event["name"]
    ]  # fmt: skip
    if not kernels:
        raise InputError(f"trace: {files[-1]} holds no kernels; its lines are {sorted(set(threads.values()))}")
    return kernels, "GPU streams" if streams else "CPU threads (coarse: events of a loop lie inside it)"


def _labels(events: list[dict[str, Any]]) -> tuple[dict[int, str], dict[tuple[int, int], str]]:
    """Names of processes, and of threads by process."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    return processes, threads


def summary(kernels: list[Kernel], updates: int, steps: int) -> dict[str, Any]:
    """By kernel name (numbers at its end apart, so that unrolled copies are one): launches and time; and idle time."""
    durations: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        durations[re.sub(r"([._]\d+)+$", "", kernel.name)].append(kernel.duration)
    total = sum(kernel.duration for kernel in kernels)
    start = min(kernel.start for kernel in kernels)
    span = max(kernel.start + kernel.duration for kernel in kernels) - start
    rows = [
        {
            "kernel": name, "per_update": len(times) / updates, "per_step": len(times) / updates / steps,
            "total_us_per_update": sum(times) / updates, "mean_us": sum(times) / len(times),
            "share": sum(times) / total if total else 0.0,
        }
        for name, times in sorted(durations.items(), key=lambda item: -sum(item[1]))
    ]  # fmt: skip
    return {
        "span_us_per_update": span / updates,
        "busy_us_per_update": busy(kernels) / updates,
        "idle_share": 1 - busy(kernels) / span if span else 0.0,
        "kernels_per_update": len(kernels) / updates,
        "kernels": rows,
    }


def busy(kernels: list[Kernel]) -> float:
    """Microseconds in which at least one kernel runs: streams may overlap."""
    covered, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        stop = kernel.start + kernel.duration
        covered += max(0.0, stop - max(kernel.start, end))
        end = max(end, stop)
    return covered
