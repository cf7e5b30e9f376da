"""What GPU kernels need: one of Pallas's back ends, of which JAX has deprecated Triton's, and parts of a GPU."""

from __future__ import annotations

import importlib.util

import jax

OLDEST_MOSAIC = (0, 11)  # whose Mosaic GPU back end has what our kernels use
TRITON = "jax.experimental.pallas.triton"
MOSAIC = "jax.experimental.pallas.mosaic_gpu"
LARGE_SHARED_MEMORY = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}  # KiB, by compute capability
SMALL_SHARED_MEMORY = 99  # KiB, of graphics cards, and of what is not listed


def triton_obstacle() -> str:
    """Why kernels for Pallas's Triton back end cannot be compiled; "" where they can. Says nothing of the device."""
    return _missing(TRITON)


def mosaic_obstacle() -> str:
    """Why kernels for Pallas's Mosaic GPU back end cannot be compiled; "" where they can, whatever the device."""
    if jax.__version_info__ < OLDEST_MOSAIC:
        return f"it needs JAX {'.'.join(map(str, OLDEST_MOSAIC))} or newer"
    return _missing(MOSAIC)


def _missing(module: str) -> str:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a package above it is gone too
        found = None
    return "" if found else f"this version of JAX has no {module}"


def compute_capability() -> str:
    """Of the default device; "" where it is no NVIDIA GPU."""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def multiprocessors() -> int:
    """Of the default device; 0 where it does not say."""
    return int(getattr(jax.devices()[0], "core_count", None) or 0)


def shared_memory() -> int:
    """The bytes that a thread block can have on the default device; where that is no GPU, the most that one has."""
    capability = compute_capability()
    largest = max(LARGE_SHARED_MEMORY.values())
    return 1024 * (LARGE_SHARED_MEMORY.get(capability, SMALL_SHARED_MEMORY) if capability else largest)
