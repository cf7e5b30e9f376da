"""What GPU kernels need: a back end that JAX has deprecated since 0.11, and multiprocessors."""

from __future__ import annotations

import importlib.util

import jax

TRITON = "jax.experimental.pallas.triton"


def triton_obstacle() -> str:
    """Why kernels for Pallas's Triton back end cannot be compiled; "" where they can. Says nothing of the device."""
    try:
        found = importlib.util.find_spec(TRITON)
    except ModuleNotFoundError:  # a package above it is gone too
        found = None
    return "" if found else f"this version of JAX has no {TRITON}"


def multiprocessors() -> int:
    """Of the default device; 0 where it does not say."""
    return int(getattr(jax.devices()[0], "core_count", None) or 0)
