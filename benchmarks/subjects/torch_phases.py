"""The peer of a phase: one step of cuDNN's LSTM, as PyTorch calls it. Importing this module needs PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness.timing import spread
from benchmarks.subjects.torch_training import device, set_precision, torch

WIDTH, STEPS = 768, 512


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Rows of an LSTM of one layer forward, and forward and backward, over `batch` texts: seconds of all steps."""
    precision = task["precision"]
    set_precision(precision)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    lstm = torch.nn.LSTM(WIDTH, WIDTH).to(device(), kind)
    x = torch.randn(STEPS, task["batch"], WIDTH, device=device(), dtype=kind)

    def forward() -> None:
        lstm(x)

    def both() -> None:
        lstm(x)[0].sum().backward()

    runs = {"forward": forward, "forward and backward": both}
    return {"rows": [
        {
            "name": f"cuDNN's LSTM of width {WIDTH}, {name}", "precision": precision, "waits": "-", "phases": STEPS,
            "seconds": spread(_blocks(run, task["updates"], task["repeats"])),
        }
        for name, run in runs.items()
    ]}  # fmt: skip


def _blocks(run: Callable[[], None], calls: int, repeats: int) -> list[float]:
    """Seconds of a call, in each of some blocks of calls; some calls before them warm up."""
    wait, seconds = torch.cuda.synchronize if device() == "cuda" else (lambda: None), []
    for block in range(repeats + 1):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        if block:
            seconds.append((time.perf_counter() - started) / calls)
    return seconds
