"""The parameters of a Llama's layers as `token_kernel.py` reads them; without Pallas."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from newllm_jax.smollm.kernel_shares import padded
from newllm_jax.smollm.token_step import stacked_layers


class Kernels(NamedTuple):
    """The parameters of all layers as the kernel reads them.

    A block reads whole rows of a kernel, so they are `[L, out, in]`, and filled up with zeros to whole chunks. The
    scales of RMSNorm are multiplied into the kernels that read its result.

    Attributes:
      query_key_value: `[L, (Q + 2 K) D, H]`.
      output: `[L, H, Q D]`.
      gate_up: `[L, 2 I, H]`.
      down: `[L, H, I]`.
    """

    query_key_value: Any
    output: Any
    gate_up: Any
    down: Any


def kernels_of(blocks: Any, dtype: Any = jnp.float32) -> Kernels:
    """From the parameters of `Backbone`'s blocks, stored in a type."""
    layers = stacked_layers(blocks)
    stacked = Kernels(
        layers.query_key_value * layers.attention_norm[:, :, None], layers.output,
        layers.gate_up * layers.mlp_norm[:, :, None], layers.down,
    )  # fmt: skip
    return Kernels(*(_whole_chunks(jnp.swapaxes(leaf, 1, 2)).astype(dtype) for leaf in stacked))


def _whole_chunks(x: jax.Array) -> jax.Array:
    """Its last axis filled up with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded(x.shape[-1]) - x.shape[-1])])
