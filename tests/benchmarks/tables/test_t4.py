"""The estimate for a T4: which of three times bounds an update, and how near the model is to what was measured."""

from __future__ import annotations

import re

import pytest

from benchmarks.harness.work import Work
from benchmarks.tables.t4 import T4, Card, check, estimates

pytestmark = pytest.mark.quick


def test_the_longest_time_and_the_sum():
    card = Card(flops=10.0, bytes=100.0, kernel=0.5)
    assert card.times(Work(flops=20.0, bytes=100.0), 2) == (2.0, 4.0)
    assert card.times(Work(flops=10.0, bytes=300.0), 2) == (3.0, 5.0)
    assert card.times(Work(flops=10.0, bytes=100.0), 8) == (4.0, 6.0)


def test_the_model_is_near_the_time_that_was_measured():
    """On the card that the kernels were counted on, the sum is within a fifth."""
    lines = [line.split("|")[2:4] for line in check().splitlines()[2:]]
    assert len(lines) == 2
    for model, measured in lines:
        _, most = map(float, model.split(" to "))
        assert 0.8 < most / float(measured) < 1.25


def test_half_precision_moves_less_and_every_line_names_what_was_published():
    lines = estimates().splitlines()[2:]
    ranges = [tuple(map(int, re.search(r"\*\*(\d+) to (\d+) s\*\*", line).groups())) for line in lines]
    assert all(least < most for least, most in ranges)
    assert ranges[0][1] < ranges[1][1]  # advanced in fp16, in fp32
    assert T4["fp16"].flops > T4["fp32"].flops
    assert [line.split("|")[-2].strip() for line in lines] == ["36 to 42 s", "36 to 42 s", "-", "-", "852.7 s"]
