"""Named precisions of the matrix products. State, losses and statistics are float32 in all of them.

A precision is one of the names `fp32`, `tf32`, `bf16` and `fp16` from the command line to the product; only there, in
`dot`, `product` and the layers of Flax, it becomes what JAX calls it, `PRECISIONS[name]`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.config import AskedPrecision, Precision, RunConfig
from newllm_jax.errors import InputError

# bf16 and fp16 round float32 operands inside each product; its sums are float32, and so is its result unless
# `storage_type` says that it may be stored in fewer bits.
PRECISIONS: dict[Precision, Any] = {
    "fp32": jax.lax.Precision.HIGHEST,
    "tf32": jax.lax.Precision.HIGH,
    "bf16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
    "fp16": jax.lax.DotAlgorithmPreset.F16_F16_F32,
}
# The first compute capability with such products. Elsewhere XLA would silently take float32 for tf32 and bf16, and
# JAX refuses fp16.
CAPABILITY_MAJOR = {"tf32": 8, "bf16": 8, "fp16": 7}


OPERANDS: dict[Precision, Any] = {"bf16": jnp.bfloat16, "fp16": jnp.float16}  # of those that have a type of their own


def operand_type(precision: Precision) -> Any:
    """The type to which the products round their operands: float32 for fp32, and for tf32, which is no type."""
    return OPERANDS.get(precision, jnp.float32)


def storage_type(precision: Precision) -> Any:
    """The type in which the GPU kernels, the head and the loss store activations and gradients.

    Not float16, in which small gradients of logits would be 0.
    """
    return jnp.bfloat16 if precision == "bf16" else jnp.float32


def dot(left: jax.Array, right: jax.Array, precision: Precision) -> jax.Array:
    """`left @ right` in float32, of float32 arrays; the right one may have been rounded to `operand_type` before."""
    if right.dtype == jnp.float32:
        return jnp.dot(left, right, precision=PRECISIONS[precision])
    return jnp.dot(left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def product(
    subscripts: str, left: jax.Array, right: jax.Array, precision: Precision, result: Any = jnp.float32
) -> jax.Array:
    """`jnp.einsum` of two operands of one type.

    Operands in half precision need no rounding; a precision argument would make XLA copy them.
    """
    how = PRECISIONS[precision] if left.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, left, right, precision=how, preferred_element_type=result)


def supported_precisions() -> list[Precision]:
    """The precisions that the default device really has."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # NVIDIA's is a number, AMD's is not
    major = capability.split(".")[0]
    return [name for name in PRECISIONS if int(major if major.isdigit() else 0) >= CAPABILITY_MAJOR.get(name, 0)]


def resolve_precision(name: AskedPrecision) -> Precision:
    """`auto` selects `tf32` on a GPU that has it and `fp32` elsewhere; any other name is returned as it is.

    New-LLM has a rule of its own for `auto`: `newllm.updates.training_precision`.

    Raises:
      InputError: a precision that the default device would replace by another one, or does not have.
    """
    supported = supported_precisions()
    if name == "auto":
        return "tf32" if "tf32" in supported else "fp32"
    if name not in supported:
        raise InputError(
            f"precision: {name} needs an NVIDIA GPU of compute capability {CAPABILITY_MAJOR[name]}.0 or newer, "
            f"which {jax.devices()[0].device_kind} is not; use {' or '.join(supported)} (a new run), or auto"
        )
    return name


def configured_precision(config: RunConfig) -> Precision:
    """`resolve_precision` of a configuration."""
    return resolve_precision(config.precision)
