"""What follows from the measured rows: shares of the ceilings, factors, and how well the losses agree."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.work import Work


def complete(rows: list[dict[str, Any]], steps: int, counted: Work, ceilings: dict[str, Any]) -> None:
    """Adds to every row that was measured what follows from its time; the first is the library's.

    Args:
      steps: updates in an epoch.
      counted: the work of an update; a row that says `another_model` does other work.
    """
    ours = rows[0]
    for row in rows:
        if "error" in row:
            continue
        seconds = row["update_seconds"]["median"]
        row |= {"epoch_seconds": seconds * steps, "times_ours": seconds / ours["update_seconds"]["median"]}
        if not row.get("another_model"):
            row |= shares(counted, seconds, row["precision"], ceilings)
            row["agreement"] = agreement(ours, row)


def shares(counted: Work, seconds: float, precision: str, ceilings: dict[str, Any]) -> dict[str, float]:
    """The shares of this machine's ceilings that doing so much work in so many seconds reaches."""
    flops = ceilings["flops_per_second"]
    return {
        "flops_fraction": counted.flops / seconds / flops.get(precision, flops["fp32"]),
        "bytes_fraction": counted.bytes / seconds / ceilings["bytes_per_second"],
    }


def agreement(ours: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """How far a row's losses are from the library's after the same updates.

    `timed` is the largest difference of a timed block's mean loss (nats), to be compared with `by_chance`, the
    library's own under other dropout masks; `strict` the largest relative one in float32 where nothing is random.
    """
    found = {"timed": max(abs(a - b) for a, b in zip(ours["losses"], row["losses"], strict=True))}
    if "losses_other_dropout" in ours:
        found["by_chance"] = max(abs(a - b) for a, b in zip(ours["losses"], ours["losses_other_dropout"], strict=True))
    if "losses_strict" in row:
        pairs = zip(ours["losses_strict"], row["losses_strict"], strict=True)
        found["strict"] = max(abs(a - b) / a for a, b in pairs)
    return found
