"""These tests need an NVIDIA GPU that has tf32 and bf16; elsewhere they are skipped, with the reason.

Run them in one process, `pytest -n 0 tests/gpu`: the kernels of several processes would share one GPU.
"""

from __future__ import annotations

import importlib.util
import os

import jax
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when JAX first uses the GPU
CAPABILITY = 8.0  # compute capability


def obstacle() -> str:
    """Why the tests cannot run here; "" where they can."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU; JAX has {device.platform}"
    capability = str(getattr(device, "compute_capability", ""))  # of AMD's GPUs it is no number
    if not capability.replace(".", "", 1).isdigit() or float(capability) < CAPABILITY:
        return (
            f"needs an NVIDIA GPU of compute capability {CAPABILITY}; {device.device_kind} has {capability or 'none'}"
        )
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"needs Pallas's Triton back end, which JAX {jax.__version__} does not have"
    return ""


@pytest.fixture(scope="session", autouse=True)
def gpu_with_tensor_cores():
    """Skips every test of this folder where there is none."""
    reason = obstacle()
    if reason:
        pytest.skip(reason)
