"""The blocks of a Llama on texts of one token: attention sees one key, so it passes the value on.

What `Backbone` computes for such texts, with less work: no queries, keys or softmax, and the gradient of each weight is
one product for all layers, formed after the chain through the layers instead of inside it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from newllm_jax.cascade.llama_config import LlamaConfig
from newllm_jax.cascade.smollm import rms_norm

Stacks: TypeAlias = dict[str, list[jax.Array]]  # by product or norm, one array `[tokens, ...]` a layer

KERNELS = {  # a product's name -> where its kernel is in the parameters of the blocks
    "value": ("attention", "v_proj"),
    "output": ("attention", "o_proj"),
    "gate": ("mlp", "gate_proj"),
    "up": ("mlp", "up_proj"),
    "down": ("mlp", "down_proj"),
}
NORMS = ("attention_norm", "mlp_norm")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def through_blocks(config: LlamaConfig, precision: jax.lax.PrecisionLike, blocks: Any, x: jax.Array) -> jax.Array:
    """The residual stream after all layers.

    Args:
      precision: of the products.
      blocks: the parameters of `Backbone`'s blocks, stacked by layer.
      x: `[tokens, hidden]`, the residual stream before the first layer.
    """
    return _forward(config, precision, blocks, x)[0]


def _forward(config: LlamaConfig, precision: jax.lax.PrecisionLike, blocks: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """Keeps what goes into each norm and product, and what comes out of the gated ones."""
    kept: Stacks = {name: [] for name in (*KERNELS, *NORMS, "gated", "raised")}

    def keep(name: str, value: jax.Array) -> jax.Array:
        kept[name].append(value)
        return value

    def product(name: str, layer: int, operand: jax.Array) -> jax.Array:
        return jnp.dot(keep(name, operand), _kernel(blocks, name, layer), precision=precision)

    def normed(name: str, layer: int, x: jax.Array) -> jax.Array:
        return rms_norm(keep(name, x), blocks[name]["scale"][layer], config.rms_norm_eps)

    for layer in range(config.num_layers):
        value = product("value", layer, normed("attention_norm", layer, x))
        x = x + product("output", layer, _to_query_heads(config, value))
        read = normed("mlp_norm", layer, x)
        gated, raised = keep("gated", product("gate", layer, read)), keep("raised", product("up", layer, read))
        x = x + product("down", layer, _gate(gated, raised))
    return x, (kept, blocks)


def _backward(
    config: LlamaConfig, precision: jax.lax.PrecisionLike, saved: Any, d_x: jax.Array
) -> tuple[Any, jax.Array]:
    kept, blocks = saved
    # Else XLA shares each layer's slice of a kernel between both passes, and copies it out of the stack to do so.
    blocks = jax.lax.optimization_barrier(blocks)
    d_results: Stacks = {name: [] for name in (*KERNELS, *NORMS)}

    def product(name: str, layer: int, d_result: jax.Array) -> jax.Array:
        d_results[name].insert(0, d_result)
        return jnp.dot(d_result, _kernel(blocks, name, layer).T, precision=precision)

    def normed(name: str, layer: int, d_result: jax.Array) -> jax.Array:
        d_results[name].insert(0, d_result)
        scale = blocks[name]["scale"][layer]
        _, pullback = jax.vjp(lambda x: rms_norm(x, scale, config.rms_norm_eps), kept[name][layer])
        return pullback(d_result)[0]

    for layer in reversed(range(config.num_layers)):
        _, gate_pullback = jax.vjp(_gate, kept["gated"][layer], kept["raised"][layer])
        d_gated, d_raised = gate_pullback(product("down", layer, d_x))
        d_x = d_x + normed("mlp_norm", layer, product("gate", layer, d_gated) + product("up", layer, d_raised))
        heads = product("output", layer, d_x).reshape(-1, config.num_kv_heads, *_shared(config))
        d_value = jnp.sum(heads, axis=2).reshape(d_x.shape[0], -1)
        d_x = d_x + normed("attention_norm", layer, product("value", layer, d_value))

    gradients = jax.tree.map(jnp.zeros_like, blocks)  # and so it stays for queries and keys
    for name, (part, kernel) in KERNELS.items():
        inputs, d_result = jnp.stack(kept[name]), jnp.stack(d_results[name])
        gradients[part][kernel]["kernel"] = jnp.einsum("lti,lto->lio", inputs, d_result, precision=precision)
    for name in NORMS:
        unit = rms_norm(jnp.stack(kept[name]), jnp.ones(()), config.rms_norm_eps)
        gradients[name]["scale"] = jnp.sum(unit * jnp.stack(d_results[name]), axis=1)
    return gradients, d_x


through_blocks.defvjp(_forward, _backward)


def _kernel(blocks: Any, name: str, layer: int) -> jax.Array:
    part, kernel = KERNELS[name]
    return blocks[part][kernel]["kernel"][layer]


def _gate(gated: jax.Array, raised: jax.Array) -> jax.Array:
    return jax.nn.silu(gated) * raised


def _shared(config: LlamaConfig) -> tuple[int, int]:
    """How many query heads read a value head, and its size."""
    return config.num_heads // config.num_kv_heads, config.head_dim


def _to_query_heads(config: LlamaConfig, value: jax.Array) -> jax.Array:
    """`[tokens, kv_heads * head_dim]` -> `[tokens, heads * head_dim]`: what attention to one key gives each head."""
    heads = value.reshape(-1, config.num_kv_heads, 1, config.head_dim)
    return jnp.broadcast_to(heads, (len(value), config.num_kv_heads, *_shared(config))).reshape(len(value), -1)
