"""The profile's arithmetic, on intervals that a pencil can check."""

from __future__ import annotations

import gzip
import json

import pytest

from benchmarks.harness.trace import Kernel, busy, read_trace, summary
from newllm_jax.errors import InputError

pytestmark = pytest.mark.quick

KERNELS = [
    Kernel("dot.1", 0, 4), Kernel("add_2", 2, 4), Kernel("dot.3", 8, 1), Kernel("dot.1", 9, 1), Kernel("add_2", 19, 1)
]  # fmt: skip


def test_overlapping_kernels_are_busy_once():
    assert busy(KERNELS) == 6 + 2 + 1


def test_summary_is_per_update_and_step_and_finds_the_idle_time():
    found = summary(KERNELS, updates=2, steps=3)
    assert found["span_us_per_update"] == 10
    assert found["idle_share"] == pytest.approx(1 - 9 / 20)
    dot, add = found["kernels"]
    assert (dot["kernel"], dot["per_update"], dot["per_step"]) == ("dot", 1.5, 0.5)
    assert (dot["total_us_per_update"], dot["mean_us"]) == (3, 2)
    assert dot["share"] == pytest.approx(6 / 11) and add["share"] == pytest.approx(5 / 11)


def test_only_the_streams_of_a_gpu_are_read(tmp_path):
    def named(kind, name, **place):
        return {"ph": "M", "name": f"{kind}_name", "args": {"name": name}, **place}

    events = [
        named("process", "/device:GPU:0", pid=1), named("thread", "Stream #7(Compute)", pid=1, tid=7),
        named("thread", "XLA Ops", pid=1, tid=8), named("process", "/host:CPU", pid=2),
        named("thread", "tf_XLAEigen", pid=2, tid=7),
    ]  # fmt: skip
    events += [
        {"ph": "X", "pid": pid, "tid": tid, "ts": 1, "dur": 2, "name": f"{pid}-{tid}"}
        for pid, tid in [(1, 7), (1, 8), (2, 7)]
    ]
    folder = tmp_path / "plugins" / "profile"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as stream:
        json.dump({"traceEvents": events}, stream)
    kernels, device = read_trace(tmp_path)
    assert (kernels, device) == ([Kernel("1-7", 1, 2)], "GPU streams")


def test_a_missing_trace_is_said_so(tmp_path):
    with pytest.raises(InputError, match="left no"):
        read_trace(tmp_path)
