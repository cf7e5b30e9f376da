"""The estimate for a T4: which of three times bounds an update, and what the table makes of counts."""

from __future__ import annotations

import re

import pytest

from benchmarks.harness.t4 import Bounds
from benchmarks.tables.files import load
from benchmarks.tables.t4 import PUBLISHED_STAGES as STAGES
from benchmarks.tables.t4 import UPDATES, estimates, stages

pytestmark = pytest.mark.quick


def test_the_longest_time_and_the_sum():
    bounds = Bounds.of("fp16", flops=65e12, moved=640e9, kernels=100_000)
    assert (bounds.products, bounds.memory, bounds.launches) == pytest.approx((1, 2, 0.5))
    assert (bounds.least, bounds.total) == pytest.approx((2, 3.5))
    assert Bounds.of("fp32", 8.1e12, 0, 0).least == pytest.approx(1)


def seconds(table: str) -> list[tuple[int, int]]:
    return [tuple(map(int, found)) for found in re.findall(r"\*\*(\d+) to (\d+) s\*\*", table)]


def test_an_epoch_is_its_updates():
    row = {
        "config": "advanced",
        "precision": "fp16",
        "planned_memory_bytes": 2**30,
        "bytes": 32e9,
        "kernels": 4000,
        "vocabulary": 1000,
    }
    (line,) = estimates([row]).splitlines()[2:]
    assert seconds(line) == [(10, 13)]  # 100 updates of 100 ms for the bytes, 13 for the products, 20 for the kernels
    assert "1.00" in line and line.rstrip(" |").endswith("36 to 42 s")
    assert "1,068" in estimates([row | {"config": "wikitext2", "vocabulary": 33_278}])  # GFLOP, most of them the head's
    assert "36 to 42" not in estimates([row | {"config": "baseline"}])


def test_updates_are_those_that_were_measured_and_the_stages_those_of_the_run():
    for name, updates in UPDATES.items():
        assert load(f"benchmarks/newllm-{name}-h200.json")["configs"][name]["updates_per_epoch"] == updates
    least, most = seconds(stages())[0]
    assert 0 < least < most < float(STAGES.removesuffix(" s"))
