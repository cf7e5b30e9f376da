"""The peer of a phase: one step of cuDNN's LSTM, as PyTorch calls it. Importing this module needs PyTorch."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.timing import block_seconds, spread
from benchmarks.subjects.torch_training import device, set_precision, torch

WIDTH = 768  # the one whose step takes the time that is hoped for of a phase
STEPS = 512  # so that starting and ending does not count


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Rows of an LSTM of one layer forward, and forward and backward, over `batch` texts: seconds of all steps."""
    precision = task["precision"]
    set_precision(precision)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    lstm = torch.nn.LSTM(WIDTH, WIDTH).to(device(), kind)
    wait = torch.cuda.synchronize if device() == "cuda" else lambda: None
    x = torch.randn(STEPS, task["batch"], WIDTH, device=device(), dtype=kind)

    def forward(calls: int) -> None:
        for _ in range(calls):
            lstm(x)
        wait()

    def both(calls: int) -> None:
        for _ in range(calls):
            lstm(x)[0].sum().backward()
        wait()

    runs = {"forward": forward, "forward and backward": both}
    return {"rows": [
        {
            "name": f"cuDNN's LSTM of width {WIDTH}, {name}", "precision": precision, "phases": STEPS,
            "seconds": spread(block_seconds(run, task["updates"], task["repeats"])),
        }
        for name, run in runs.items()
    ]}  # fmt: skip
