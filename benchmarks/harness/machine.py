"""What this machine is and can do: versions, device, and the ceilings that a rate is a share of."""

from __future__ import annotations

import os
import re
import statistics
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness.timing import timed
from newllm_jax.records.machine import environment
from newllm_jax.training.precision import resolve_precision

REPEATS = 7
PRODUCTS = {  # operands and precision, by the name of the precision
    "fp32": (jnp.float32, jax.lax.Precision.HIGHEST),
    "tf32": (jnp.float32, jax.lax.Precision.DEFAULT),
    "bf16": (jnp.bfloat16, jax.lax.Precision.DEFAULT),
}


def on_cpu() -> bool:
    """Whether JAX computes on the CPU."""
    return jax.devices()[0].platform == "cpu"


def device_slug(device: str) -> str:
    """A device's name for a file: `NVIDIA H200` is `h200`."""
    words = [word for word in re.split(r"[^a-z0-9]+", device.lower()) if word not in {"nvidia", "tesla", "geforce", ""}]
    return "-".join(words) or "device"


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """The environment, and where the task asks for them the ceilings of the device. A bad precision is refused."""
    resolve_precision(task["precision"])
    found = environment(task["precision"])
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found |= {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "slug": device_slug(found["device"])}
    return {"environment": found, **({"ceilings": ceilings()} if task["ceilings"] else {})}


def ceilings() -> dict[str, Any]:
    """Operations a second of a large product in each precision, and bytes a second through memory.

    Those are of a large copy, read and written, and of a product of one row, which only reads the matrix.
    """
    size, floats = (2048, 2**25) if on_cpu() else (8192, 2**28)
    names = ["fp32"] if on_cpu() else list(PRODUCTS)
    return {
        "flops_per_second": {name: 2 * size**3 / _product_seconds(name, size) for name in names},
        "bytes_per_second": 2 * 4 * floats / _copy_seconds(floats),
        "read_bytes_per_second": 4 * floats / _read_seconds(floats),
        "product_size": size,
        "copied_bytes": 4 * floats,
    }


def _product_seconds(name: str, size: int) -> float:
    dtype, precision = PRODUCTS[name]
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    product = jax.jit(partial(jnp.matmul, precision=precision))
    return _median(lambda: product(left, right).block_until_ready())


def _copy_seconds(floats: int) -> float:
    source = jax.random.normal(jax.random.key(0), (floats,))
    copy = jax.jit(lambda x: x + 1)  # a plain copy would be an alias
    return _median(lambda: copy(source).block_until_ready())


def _read_seconds(floats: int, width: int = 2**11) -> float:
    matrix, row = jnp.ones((floats // width, width)), jnp.ones((1, width))
    product = jax.jit(lambda row, matrix: row @ matrix.T)
    return _median(lambda: product(row, matrix).block_until_ready())


def _median(action: Any) -> float:
    action()
    return statistics.median(timed(action) for _ in range(REPEATS))
