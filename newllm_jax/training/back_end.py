"""Whether JAX still has the back end in which the GPU kernels are written; deprecated since JAX 0.11."""

from __future__ import annotations

import importlib.util

TRITON = "jax.experimental.pallas.triton"


def triton_obstacle() -> str:
    """Why kernels for Pallas's Triton back end cannot be compiled; "" where they can. Says nothing of the device."""
    try:
        found = importlib.util.find_spec(TRITON)
    except ModuleNotFoundError:  # a package above it is gone too
        found = None
    return "" if found else f"this version of JAX has no {TRITON}"
