"""How an update is timed: warm-up and compilation apart, blocks of updates ended by a synchronisation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

WARM_UP = 4  # updates at least, before the first timed block; a CUDA graph makes three of them before its capture


class Training(Protocol):
    """A training under measurement, whatever the framework."""

    def prepare(self) -> int:
        """Compiles or captures. Returns how many updates that made (of those that warm up)."""
        ...

    def run(self, updates: int) -> None:
        """Makes the next updates, and waits until they are done."""
        ...

    def loss(self) -> float:
        """The mean loss of the updates since the last call."""
        ...


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, extremes and number of some times."""
    return {
        "median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "repeats": len(seconds)
    }  # fmt: skip


def timed(action: Callable[[], object]) -> float:
    """Seconds of an action that waits for its own end."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def block_seconds(run: Callable[[int], object], calls: int, repeats: int) -> list[float]:
    """Seconds of a call in each of some blocks of calls, after one that warms up; `run` makes so many, and waits."""
    run(calls)
    return [timed(partial(run, calls)) / calls for _ in range(repeats)]


def updates_needed(updates: int, repeats: int, curve: int = 0) -> int:
    """How many batches `time_updates` reads, and `loss_curve` of so many updates."""
    return max(max(updates, WARM_UP) + updates * repeats, WARM_UP + curve)


def time_updates(training: Training, updates: int, repeats: int) -> dict[str, Any]:
    """Times `repeats` blocks of `updates` updates.

    Returns:
      `prepare_seconds`, `update_seconds` (of one update: median and spread over the blocks), and `losses`, the mean
      loss of the warm-up and of each block: every training makes the same updates, so the curves can be compared.
    """
    return time_in_turns([training], updates, repeats)[0]


def time_in_turns(trainings: Sequence[Training], updates: int, repeats: int) -> list[dict[str, Any]]:
    """`time_updates` of several trainings, a block of each in turn: all meet the same changes of the machine."""
    prepared, losses, seconds = [], [], [[] for _ in trainings]
    for training in trainings:
        started = time.perf_counter()
        made = training.prepare()
        prepared.append(time.perf_counter() - started)
        training.run(max(updates, WARM_UP) - made)
        losses.append([training.loss()])
    for _ in range(repeats):
        for index, training in enumerate(trainings):
            seconds[index].append(timed(partial(training.run, updates)) / updates)
            losses[index].append(training.loss())
    return [
        {
            "prepare_seconds": prepared[index],
            "update_seconds": {**spread(seconds[index]), "updates_per_repeat": updates},
            "losses": losses[index],
        }
        for index in range(len(trainings))
    ]


def loss_curve(training: Training, updates: int) -> list[float]:
    """The mean loss of the first four updates, then that of each of the next `updates`."""
    training.run(WARM_UP - training.prepare())
    losses = [training.loss()]
    for _ in range(updates):
        training.run(1)
        losses.append(training.loss())
    return losses
