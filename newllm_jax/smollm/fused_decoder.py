"""SmolLM2 making one text on a GPU, all layers of a token in one kernel: `token_kernel.py`.

Pallas, in which the kernel is written, is imported where it is used: it takes time, and newer versions of JAX may no
longer have the back end that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from newllm_jax.decoding.loop import Decoder
from newllm_jax.smollm.decoder import BaseDecoder, TokenWeights, prompt_cache, token_logits, token_weights
from newllm_jax.smollm.kernel_shares import obstacle
from newllm_jax.smollm.kernel_weights import kernels_of
from newllm_jax.smollm.model import SmolLM2, rms_norm, rotary_embedding
from newllm_jax.training.back_end import multiprocessors, triton_obstacle
from newllm_jax.training.precision import supported_precisions
from newllm_jax.training.step import Params


class FusedCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      keys, values: `[L, capacity, kv_heads, head_dim]`; the capacity is what was asked for, or a little more.
      length: how many positions are filled, a scalar.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array


@dataclass(frozen=True)
class FusedDecoder:
    """A SmolLM2 that makes one text, in which every token passes all layers: `BaseDecoder`'s numbers up to rounding.

    The kernel computes in float32, also where weights and caches are bfloat16.

    Attributes:
      blocks: thread blocks of the kernel, one for each multiprocessor.
    """

    model: SmolLM2
    blocks: int

    exits = 1

    def prepare(self, params: Params) -> TokenWeights:
        """The model's parameters as `step` reads them, its layers as one."""
        backbone: Any = params["backbone"]
        return token_weights(self.model, params, kernels_of(backbone["blocks"], self.model.dtype))

    def start(self, params: Params, ids: jax.Array, length: jax.Array, capacity: int) -> FusedCache:
        """The cache after the first `length` of `ids [1, T]`."""
        from newllm_jax.smollm.token_kernel import POSITIONS

        cache = prompt_cache(self.model, params, ids, -(-capacity // POSITIONS) * POSITIONS)
        return FusedCache(cache.keys[:, 0], cache.values[:, 0], length)

    def step(
        self, weights: TokenWeights, cache: FusedCache, tokens: jax.Array
    ) -> tuple[FusedCache, jax.Array, jax.Array]:
        """The cache with `tokens [1]`, logits `[1, V]`, and exits `[1]`, all 0.

        A token that does not fit into the cache gives NaN, never a wrong number.
        """
        from newllm_jax.smollm.token_kernel import run_layers

        config, position = self.model.config, cache.length
        x = jnp.take(weights.embedding, tokens[0], axis=0).astype(jnp.float32)
        rotary = jnp.concatenate(rotary_embedding(position[None], config.head_dim, config.rope_theta))
        caches = cache.keys, cache.values
        x, caches = run_layers(config, weights.layers, caches, x, position, rotary, self.blocks)
        x = jnp.where(position < cache.keys.shape[1], x, jnp.nan)[None]
        last = rms_norm(x, weights.norm, config.rms_norm_eps).astype(self.model.dtype)
        return FusedCache(*caches, position + 1), token_logits(self.model, weights, last), jnp.zeros(1, jnp.int32)


def decoder_for(model: SmolLM2, texts: int) -> Decoder:
    """The fastest decoder of a SmolLM2 by itself on the default device, for a number of texts at a time."""
    if texts > 1 or kernel_obstacle(model):
        return BaseDecoder(model)
    return FusedDecoder(model, multiprocessors())


def kernel_obstacle(model: SmolLM2) -> str:
    """Why `FusedDecoder` cannot make a text with a model on the default device; "" where it can."""
    if "tf32" not in supported_precisions() or not multiprocessors():
        return f"{jax.devices()[0].device_kind} is no GPU that runs the kernel"
    if model.dtype not in (jnp.float32, jnp.bfloat16):
        return f"weights must be float32 or bfloat16, not {jnp.dtype(model.dtype).name}"
    return obstacle(model.config, jnp.dtype(model.dtype).itemsize, multiprocessors()) or triton_obstacle()


def slow_text_warning(model: SmolLM2) -> str:
    """Why this version of JAX makes a text without the kernel that the device could run; "" where nothing is lost."""
    reason = triton_obstacle()
    lost = reason and kernel_obstacle(model) == reason
    return f"A text is made without a GPU kernel of its own, and more slowly: {reason}." if lost else ""
