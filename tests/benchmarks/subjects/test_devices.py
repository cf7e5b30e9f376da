"""What a measurement on several devices differs in from its configuration."""

from __future__ import annotations

import pytest

from benchmarks.subjects.devices import settings_of
from newllm_jax.training.mesh import DeviceMesh

pytestmark = pytest.mark.quick


def test_a_device_computes_no_more_examples_at_a_time_than_it_is_allowed():
    task = {"work": "lora", "batch": 512, "device_batch": 128}
    assert settings_of(task, DeviceMesh()) == {"batch_size": 512, "mesh": "data=1", "micro_batch": 128}
    assert settings_of(task, DeviceMesh(2)) == {"batch_size": 512, "mesh": "data=2", "micro_batch": 256}
    assert settings_of(task, DeviceMesh(4)) == {"batch_size": 512, "mesh": "data=4"}
    assert settings_of({"batch": 512, "device_batch": None}, DeviceMesh()) == {"batch_size": 512, "mesh": "data=1"}
