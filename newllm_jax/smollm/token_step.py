"""One token of each text through layers of a Llama, with the keys and values of the tokens before it in a cache.

The same numbers as `smollm.model.Backbone` on a piece of one token, in the form that generation needs, where a token
costs little more than starting the kernels and reading the weights once: the layers are not stacked, so that no slice
of a stack is copied; query, key and value are one product, gate and up another.

In shapes, B is the texts, H the hidden size, I the intermediate size. All texts stand at the same position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from newllm_jax.config import Precision
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import rms_norm, rotary_embedding, rotate
from newllm_jax.training.precision import PRECISIONS

LayerCache: TypeAlias = tuple[jax.Array, jax.Array]  # keys and values, each [B, capacity, kv_heads, head_dim]


class Layer(NamedTuple):
    """The parameters of one layer.

    Attributes:
      attention_norm, mlp_norm: scales `[H]`.
      query_key_value: `[H, (heads + 2 kv_heads) head_dim]`, three kernels side by side, as `stored_kernel` stores it.
      output: `[heads head_dim, H]`, likewise.
      gate_up: `[H, 2 I]`, two kernels side by side, likewise.
      down: `[I, H]`, likewise.
    """

    attention_norm: jax.Array
    query_key_value: jax.Array
    output: jax.Array
    mlp_norm: jax.Array
    gate_up: jax.Array
    down: jax.Array


def stacked_layers(blocks: Any, dtype: Any = jnp.float32) -> Layer:
    """All layers as one, from the parameters of `Backbone`'s blocks: leaves have a leading layer axis.

    Args:
      dtype: of the kernels `[L, in, out]`; scales stay float32.
    """

    def kernels(part: str, *names: str) -> jax.Array:
        return jnp.concatenate([blocks[part][name]["kernel"] for name in names], axis=-1).astype(dtype)

    return Layer(
        attention_norm=blocks["attention_norm"]["scale"],
        query_key_value=kernels("attention", "q_proj", "k_proj", "v_proj"),
        output=kernels("attention", "o_proj"),
        mlp_norm=blocks["mlp_norm"]["scale"],
        gate_up=kernels("mlp", "gate_proj", "up_proj"),
        down=kernels("mlp", "down_proj"),
    )


def unstack_layers(blocks: Any, dtype: Any = jnp.float32) -> tuple[Layer, ...]:
    """The layers one by one, their kernels as `stored_kernel` stores them; arguments of `stacked_layers`."""
    stacked = stacked_layers(blocks, dtype)
    count = len(stacked.attention_norm)
    layers = (Layer(*(leaf[number] for leaf in stacked)) for number in range(count))
    return tuple(Layer(*(stored_kernel(leaf) if leaf.ndim == 2 else leaf for leaf in layer)) for layer in layers)


def unstack_caches(keys: jax.Array, values: jax.Array) -> tuple[LayerCache, ...]:
    """The cache of each layer, from keys and values `[L, B, capacity, kv_heads, head_dim]`."""
    return tuple((keys[layer], values[layer]) for layer in range(len(keys)))


def run_layers(
    config: LlamaConfig,
    precision: Precision,
    layers: Sequence[Layer],
    caches: Sequence[LayerCache],
    x: jax.Array,
    position: jax.Array,
    passing: jax.Array | None = None,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Consecutive layers, any range of them, on one token of each text.

    Args:
      x: `[B, H]`, the residual stream before the first of the layers.
      position: of the token in its text, a scalar; its keys and values are written there, and it sees those up to it.
      passing: `[B]`, which tokens pass these layers, None for all. The others keep their residual stream, whose keys
        and values each layer nevertheless writes: later tokens of their texts see them.

    Returns:
      The residual stream `[B, H]` after the layers, and the caches.
    """
    rotary = rotary_embedding(position[None], config.head_dim, config.rope_theta)
    written = []
    for layer, cache in zip(layers, caches, strict=True):
        query, key, value = _query_key_value(config, precision, layer, x, rotary)
        cache = _write(cache, key, value, position)
        after = x + multiply(attend(query, cache, position, precision), layer.output, precision)
        gate_up = multiply(rms_norm(after, layer.mlp_norm, config.rms_norm_eps), layer.gate_up, precision)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        after = after + multiply(jax.nn.silu(gate) * up, layer.down, precision)
        x = after if passing is None else jnp.where(passing[:, None], after, x)
        written.append(cache)
    return x, tuple(written)


def write_keys_and_values(
    config: LlamaConfig,
    precision: Precision,
    layers: Sequence[Layer],
    caches: Sequence[LayerCache],
    x: jax.Array,
    position: jax.Array,
) -> tuple[LayerCache, ...]:
    """What `run_layers` does to the caches where no token passes the layers: nothing else of a layer is computed."""
    rotary = rotary_embedding(position[None], config.head_dim, config.rope_theta)
    written = []
    for layer, cache in zip(layers, caches, strict=True):
        _, key, value = _query_key_value(config, precision, layer, x, rotary, with_query=False)
        written.append(_write(cache, key, value, position))
    return tuple(written)


def stored_kernel(kernel: jax.Array) -> jax.Array:
    """A kernel `[in, out]` as `multiply` reads it: `[out, in]`, whose rows a GPU reads a quarter faster at one text."""
    return kernel.T


def multiply(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
    """`x [B, in]` times a kernel that `stored_kernel` stored, `[B, out]`."""
    return jnp.einsum("bi,oi->bo", x, kernel, precision=PRECISIONS[precision])


def multiply_rows(x: jax.Array, table: jax.Array, precision: Precision) -> jax.Array:
    """`x [B, in]` times the transpose of a table `[out, in]`, in float32: the tied head."""
    return jnp.einsum(
        "bi,oi->bo", x, table, precision=PRECISIONS[precision], preferred_element_type=jnp.float32
    )  # fmt: skip


def attend(query: jax.Array, cache: LayerCache, position: jax.Array, precision: Precision) -> jax.Array:
    """Attention of one token to those up to it.

    Args:
      query: `[B, kv_heads, heads / kv_heads, head_dim]`, turned by its position.

    Returns:
      The mix of the values for each query head, `[B, heads head_dim]`.
    """
    keys, values = cache
    products, seen = PRECISIONS[precision], jnp.arange(keys.shape[1]) <= position
    scores = jnp.einsum("bkgd,bskd->bkgs", query, keys, precision=products, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen, scores * query.shape[-1] ** -0.5, -jnp.inf), axis=-1)  # float32
    mixed = jnp.einsum("bkgs,bskd->bkgd", weights.astype(query.dtype), values, precision=products)
    return mixed.reshape(len(query), -1)


def _query_key_value(
    config: LlamaConfig,
    precision: Precision,
    layer: Layer,
    x: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    with_query: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query as `attend` wants it, key and value as the cache does, `[B, 1, kv_heads, head_dim]`."""
    kernel, kv_heads = layer.query_key_value, config.num_kv_heads
    heads = config.num_heads if with_query else 0
    if not with_query:
        kernel = kernel_columns(kernel, config.num_heads * config.head_dim)
    product = multiply(rms_norm(x, layer.attention_norm, config.rms_norm_eps), kernel, precision)
    every = product.reshape(len(x), 1, heads + 2 * kv_heads, config.head_dim)
    turned = rotate(every[:, :, : heads + kv_heads], rotary)
    query = turned[:, 0, :heads].reshape(len(x), kv_heads, -1, config.head_dim)
    return query, turned[:, :, heads:], every[:, :, heads + kv_heads :]


def kernel_columns(kernel: jax.Array, first: int) -> jax.Array:
    """The columns of a stored kernel from `first` on, stored likewise."""
    return kernel[first:]


def _write(cache: LayerCache, key: jax.Array, value: jax.Array, position: jax.Array) -> LayerCache:
    keys, values = cache
    return (
        jax.lax.dynamic_update_slice_in_dim(keys, key.astype(keys.dtype), position, axis=1),
        jax.lax.dynamic_update_slice_in_dim(values, value.astype(values.dtype), position, axis=1),
    )
