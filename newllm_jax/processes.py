"""Several processes that train one model together, each on devices of its own, connected by `jax.distributed`.

All of them run the same command and do the same computations, each with the arrays on its own devices. They agree on
what could differ (the run directory, when to stop, how many updates a call makes), and only the first one writes files,
but for checkpoints, to which each writes its part. In a single process nothing here does anything.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from newllm_jax.errors import InputError

ADDRESS, COUNT, PLACE = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUT = "NEWLLM_PROCESS_TIMEOUT"  # seconds until the others count as lost
LONGEST_TEXT = 4096  # bytes that processes can agree on

Value = TypeVar("Value", int, float, bool, str)


class Membership(NamedTuple):
    """This process among the others: what `jax.distributed.initialize` needs; None is for JAX to find out."""

    address: str | None
    processes: int | None
    number: int | None
    local_devices: list[int] | None


def place_in(environment: Mapping[str, str]) -> Membership | None:
    """The place of this process by the environment; None where it is the only one.

    It is that of the variables JAX_COORDINATOR_ADDRESS (`host:port` of the first process), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or of a Slurm job step with several tasks.

    Raises:
      InputError: variables that are missing, or no numbers of processes.
    """
    given = {name: environment.get(name, "") for name in (ADDRESS, COUNT, PLACE)}
    if any(given.values()):
        missing = [name for name, value in given.items() if not value]
        if missing:
            raise InputError(f"{missing[0]}: must be set where {' or '.join(n for n in given if given[n])} is")
        count, number = (_number(name, given[name]) for name in (COUNT, PLACE))
        if not number < count:
            raise InputError(f"{PLACE}: must be below {COUNT} ({count}), not {number}")
        if not re.fullmatch(r".+:\d{1,5}", given[ADDRESS]):
            raise InputError(f"{ADDRESS}: must be host:port of the first process, not {given[ADDRESS][:100]!r}")
        return Membership(given[ADDRESS], count, number, None) if count > 1 else None
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return None
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    devices = int(environment.get("SLURM_GPUS_ON_NODE", "1"))
    # JAX takes one device for each task; a task that is alone on its node has all of them.
    return Membership(None, None, None, list(range(devices)) if tasks and tasks[0] == "1" else None)


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text):
        raise InputError(f"{name}: must be a number, not {text[:100]!r}")
    return int(text)


def connect(environment: Mapping[str, str] = os.environ) -> None:
    """Connects this process to the others, where the environment says that there are any; before JAX is used.

    Raises:
      InputError: variables that cannot be right, or a first process that cannot be reached.
    """
    place = place_in(environment)
    if place is None:
        return
    import jax

    timeout = _number(TIMEOUT, environment.get(TIMEOUT, "100"))
    try:
        jax.distributed.initialize(
            place.address, place.processes, place.number, place.local_devices,
            cluster_detection_method="deactivate" if place.address else "slurm",
            initialization_timeout=max(timeout, 5), heartbeat_timeout_seconds=timeout,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{ADDRESS}: the processes did not find each other ({' '.join(str(error).split())[:200]})") \
            from error  # fmt: skip


def are_several() -> bool:
    """Whether other processes take part. Imports and starts nothing that is not needed for other reasons."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes what only one may write: reports, settings, lines for the reader."""
    return process_place()[0] == 0


def process_place() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if not are_several():
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def agree(value: Value) -> Value:
    """The value that the first process has. All call it at the same place."""
    if not are_several():
        return value
    from jax.experimental import multihost_utils

    if isinstance(value, str):
        return _decoded(multihost_utils.broadcast_one_to_all(_encoded(value)))
    return type(value)(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def first_reason(reason: str) -> str:
    """The first text that is not empty among those of all processes. All call it at the same place."""
    if not are_several():
        return reason
    from jax.experimental import multihost_utils

    has_one = np.asarray(multihost_utils.process_allgather(np.asarray(bool(reason))))
    if not has_one.any():
        return ""
    speaker = int(np.argmax(has_one))
    return _decoded(multihost_utils.process_allgather(_encoded(reason))[speaker])


def _encoded(text: str) -> np.ndarray:
    """A text as bytes of one length, as processes can exchange it: `[LONGEST_TEXT]` uint8."""
    return np.frombuffer(text.encode().ljust(LONGEST_TEXT, b"\0"), np.uint8)


def _decoded(text: Any) -> str:
    return np.asarray(text).tobytes().rstrip(b"\0").decode()


def by_first(work: Callable[[], object]) -> None:
    """Work on files that one process does while the others wait."""
    if not are_several():
        work()
        return
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("before the work of the first process")
    if is_first():
        work()
    multihost_utils.sync_global_devices("after the work of the first process")


def host_copies(tree: Any) -> Any:
    """The numbers of whole arrays, whichever processes their parts lie with. All call it at the same place."""
    import jax

    if not are_several():
        return jax.tree.map(np.asarray, jax.device_get(tree))
    from jax.experimental import multihost_utils

    def copy(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(copy, tree)
