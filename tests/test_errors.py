"""Errors that are the machine's: which they are, and how much memory was asked for."""

from __future__ import annotations

import errno
import os

import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.errors import disk_fault, memory_fault

pytestmark = pytest.mark.quick


def caught(action):
    with pytest.raises(Exception) as error:
        action()
    return error.value


def test_memory_that_ran_out_says_how_much_was_asked_for():
    assert memory_fault(caught(lambda: jnp.zeros((10**13,), jnp.float32))) == "37252.90 GiB"
    assert memory_fault(caught(lambda: np.zeros((10**13,), np.float64))) == "74547.20 GiB"
    assert memory_fault(caught(lambda: bytearray(2**62))) == "more"
    gpu = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.: while running replica 0"
    assert memory_fault(RuntimeError(gpu)) == "16.00 GiB"
    assert memory_fault(RuntimeError(gpu.replace("17179869184 bytes", "1.50MiB"))) == "0.00 GiB"
    assert memory_fault(RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 2.5GiB (x)")) == "2.50 GiB"


def test_a_cause_counts_and_other_errors_do_not():
    wrapped = ValueError("cannot be read")
    wrapped.__cause__ = MemoryError()
    assert memory_fault(wrapped) == "more"
    assert memory_fault(ValueError("allocate 5 bytes")) is None
    full_disk = ValueError(f"RESOURCE_EXHAUSTED: Failed writing: {os.strerror(errno.ENOSPC)}")
    assert memory_fault(full_disk) is None
    assert disk_fault(full_disk) == os.strerror(errno.ENOSPC)
