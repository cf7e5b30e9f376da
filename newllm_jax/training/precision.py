"""Named precisions of the matrix products. State, losses and statistics are float32 in all of them."""

from __future__ import annotations

import jax

TF32_COMPUTE_CAPABILITY = 8.0
PRECISIONS = {"fp32": jax.lax.Precision.HIGHEST, "tf32": jax.lax.Precision.HIGH}


def resolve_precision(name: str) -> str:
    """`auto` becomes `tf32` on a GPU that has it and `fp32` elsewhere; any other name stands for itself."""
    if name != "auto":
        return name
    capability = float(getattr(jax.devices()[0], "compute_capability", 0) or 0)  # only GPUs have one
    return "tf32" if capability >= TF32_COMPUTE_CAPABILITY else "fp32"
