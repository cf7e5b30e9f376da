"""The memory that a run needs, by a bound from shapes alone and by XLA's plan of a program, and that a machine has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from newllm_jax.errors import InputError
from newllm_jax.training.split import Data
from newllm_jax.training.step import Totals, TrainState, UpdateFn

FLOAT = 4  # bytes
ADAM_BYTES = 4 * FLOAT  # of a parameter in training: itself, its gradient and the two moments of Adam
# A plan is at most so many times the bound: smaller runs are not planned, which would compile their updates once more.
PLAN_FACTOR = 5
USABLE_SHARE = 0.9  # of the free memory; a plan is an estimate
SMALL = 2**29  # bytes: a run that needs no more is never refused, for what is free changes with every other process
CONTAINER = Path("/sys/fs/cgroup")  # where Linux tells the limits of the one that this process runs in


class DoesNotFit(InputError):
    """A run that would need more memory than is free."""


def check_memory(bound: Mapping[str, int], planned: Callable[[], int] | None = None, host: bool = False) -> None:
    """Raises DoesNotFit where a run would not fit into the memory that is free.

    Args:
      bound: bytes that the run takes at least, by the settings that they grow with.
      planned: the bytes that it takes by XLA's plan; called where the bound alone is a large part of what is free.
      host: the memory of the machine rather than that of the default device.
    """
    where, free = host_memory() if host else device_memory()
    needed = sum(bound.values())
    if free is None:
        return
    if planned and needed <= free < PLAN_FACTOR * needed:
        needed = max(needed, planned())
    if needed > max(free, SMALL):
        most = max(bound, key=lambda settings: bound[settings])
        raise DoesNotFit(
            f"memory: the run needs at least {gib(needed)}, {where} has {gib(free)} free; "
            f"lower {most} ({gib(bound[most])} of it)"
        )


def device_memory() -> tuple[str, int | None]:
    """The default device and the bytes that it has free; None where it does not say. A CPU has those of the machine."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host_memory()
    found = device.memory_stats() or {}
    free = found["bytes_limit"] - found.get("bytes_in_use", 0) if "bytes_limit" in found else None
    return device.device_kind, free


def host_memory() -> tuple[str, int | None]:
    """This machine and the bytes of memory that it has free, within the limit of a container; None where unknown."""
    free = []
    try:
        free.append(_entries(Path("/proc/meminfo"))["MemAvailable:"] * 1024)
    except (OSError, KeyError, ValueError):  # not Linux: all memory that is there
        if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, KeyError, ValueError):  # no container, or one without a limit
        free.append(int((CONTAINER / "memory.max").read_text()) - _entries(CONTAINER / "memory.stat")["anon"])
    return "this machine", min(free, default=None)


def planned_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, results and what lies between, in bytes; 0 where the back end does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    buffers = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return buffers + memory.temp_size_in_bytes


def update_bytes(updates: UpdateFn, state: TrainState, data: Data, steps: int, batch_size: int) -> int:
    """What the updates of an epoch need, data included; nothing but shapes is read.

    Args:
      state, data: shapes will do.
    """
    order: Any = jax.ShapeDtypeStruct((steps, batch_size), jnp.int32)
    totals, key = jax.eval_shape(Totals.zero), jax.eval_shape(lambda: jax.random.key(0))
    compiled = cast(Any, updates).compile(state, totals, data, order, 0, 1, key)
    return planned_bytes(compiled.function)


def gib(size: int) -> str:
    """A number of bytes as a message shows it."""
    return f"{size / 2**30:,.2f} GiB"


def _entries(path: Path) -> dict[str, int]:
    """The numbers of a file of lines `name number`."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
