"""Named precisions of the matrix products. State, losses and statistics are float32 in all of them."""

from __future__ import annotations

import jax

TF32_MAJOR = 8  # of the compute capability
PRECISIONS = {"fp32": jax.lax.Precision.HIGHEST, "tf32": jax.lax.Precision.HIGH}


def resolve_precision(name: str) -> str:
    """`auto` becomes `tf32` on a GPU that has it and `fp32` elsewhere; any other name stands for itself."""
    if name != "auto":
        return name
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # NVIDIA's is a number, AMD's is not
    major = capability.split(".")[0]
    return "tf32" if major.isdigit() and int(major) >= TF32_MAJOR else "fp32"
