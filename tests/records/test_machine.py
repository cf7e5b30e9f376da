"""What a run records of the machine."""

from __future__ import annotations

import sys

from newllm_jax.records import machine
from newllm_jax.records.machine import command_line, environment, peak_memory_bytes


def test_what_results_say_of_the_machine(monkeypatch):
    found = environment("fp32")
    assert found["platform"] == "cpu" and found["precision"] == "fp32"
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(found)
    monkeypatch.setattr(machine, "REPORTED_PACKAGES", ("jax", "not-installed"))
    assert "not-installed" not in environment("fp32")
    assert 10e6 < peak_memory_bytes() < 1e12


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", "my texts"])
    assert command_line() == "python train.py --dataset 'my texts'"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/newllm", "train"])
    assert command_line() == "newllm train"
