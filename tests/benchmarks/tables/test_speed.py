"""A ratio of the speed table compares two times in the same precision, or its column says that it does not."""

from __future__ import annotations

import pytest

from benchmarks.tables.speed import speed, speed_line

pytestmark = pytest.mark.quick


def row(name, precision, seconds):
    return {"name": name, "precision": precision, "epoch_seconds": seconds}


def test_factors_are_of_one_precision_and_those_of_bf16_are_apart():
    rows = [
        row("newllm_jax", "bf16", 1.0), row("newllm_jax", "tf32", 2.0), row("PyTorch eager", "tf32", 10.0),
        row("PyTorch CUDA graph", "tf32", 5.0),
    ]  # fmt: skip
    cells = speed_line("work", rows, "epoch_seconds")
    assert cells[:5] == ["work", "tf32", "**2.00 s**", "10.00 s (5.0x)", "5.00 s (2.5x)"]
    assert cells[5:] == ["1.00 s", "10.0x, 5.0x"]
    assert "bf16 against PyTorch in tf32" in speed().splitlines()[0].split("|")[7]


def test_peers_of_two_precisions_are_refused():
    rows = [
        row("newllm_jax", "tf32", 2.0), row("PyTorch eager", "fp32", 10.0), row("PyTorch CUDA graph", "tf32", 5.0)
    ]  # fmt: skip
    with pytest.raises(ValueError):
        speed_line("work", rows, "epoch_seconds")
