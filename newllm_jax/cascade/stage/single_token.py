"""The blocks of a Llama on texts of one token: attention sees one key, so it passes the value on.

What `Backbone` computes for such texts, with less work: no queries, keys or softmax, and the gradient of each weight is
one product for all layers, formed after the chain through the layers instead of inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import rms_norm

KERNELS = {  # a product's name -> where its kernel is in the parameters of the blocks
    "value": ("attention", "v_proj"),
    "output": ("attention", "o_proj"),
    "gate": ("mlp", "gate_proj"),
    "up": ("mlp", "up_proj"),
    "down": ("mlp", "down_proj"),
}
NORMS = ("attention_norm", "mlp_norm")


class Products(NamedTuple):
    """How to multiply with kernels that lie in stacks `[layers, in, out]`.

    Attributes:
      forward: (operand `[tokens, in]`, stacks, layer, scales `[layers, in]` of an RMSNorm that the operand goes through
        first, or None) -> by stack, operand @ kernel: `[tokens, out]`.
      backward: (gradients of those, stacks, layer) -> that of the operand, `[tokens, in]`.
      backward_normed: for an operand that went through an RMSNorm: (gradients, stacks, layer, scales, what went into
        the norm, gradient of what went around it) -> gradients of the operand and of what went into the norm, with
        that of what went around it added.
    """

    forward: Callable[[jax.Array, list[jax.Array], int, jax.Array | None], list[jax.Array]]
    backward: Callable[[list[jax.Array], list[jax.Array], int], jax.Array]
    backward_normed: Callable[
        [list[jax.Array], list[jax.Array], int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]
    ]


class Kept(NamedTuple):
    """What the way forward leaves for the way back, by product or norm, one `[tokens, ...]` a layer.

    Attributes:
      read: what goes into each norm, and into the products that read no normed operand.
      made: what the products gate and up give.
    """

    read: dict[str, list[jax.Array]]
    made: dict[str, list[jax.Array]]


class Gradients(NamedTuple):
    """What the way back gives.

    Attributes:
      kernels: by product its operand `[layers, tokens, in]` and the gradient of its result `[layers, tokens, out]`;
        their product over the tokens is the gradient of the kernel.
      norms: by norm, that of its scale `[layers, hidden]`.
      x: of what went into the first layer, `[tokens, hidden]`.
    """

    kernels: dict[str, tuple[jax.Array, jax.Array]]
    norms: dict[str, jax.Array]
    x: jax.Array


def stack(blocks: Any, name: str) -> jax.Array:
    """The kernels of a product, `[layers, in, out]`."""
    part, kernel = KERNELS[name]
    return blocks[part][kernel]["kernel"]


def forward(config: LlamaConfig, products: Products, blocks: Any, x: jax.Array) -> tuple[jax.Array, Kept]:
    """The residual stream `[tokens, hidden]` after all layers, from the one before the first."""
    kept = Kept({name: [] for name in ("output", "down", *NORMS)}, {"gate": [], "up": []})

    def product(layer: int, operand: jax.Array, *names: str, norm: str = "") -> list[jax.Array]:
        kept.read[norm or names[0]].append(operand)
        scales = blocks[norm]["scale"] if norm else None
        return products.forward(operand, [stack(blocks, name) for name in names], layer, scales)

    for layer in range(config.num_layers):
        [value] = product(layer, x, "value", norm="attention_norm")
        [attended] = product(layer, _to_query_heads(config, value), "output")
        x = x + attended
        gate, up = product(layer, x, "gate", "up", norm="mlp_norm")
        kept.made["gate"].append(gate)
        kept.made["up"].append(up)
        [lowered] = product(layer, _gated(gate, up), "down")
        x = x + lowered
    return x, kept


def backward(config: LlamaConfig, products: Products, blocks: Any, kept: Kept, d_x: jax.Array) -> Gradients:
    """The gradients, from that of what `forward` returned."""
    d_results: dict[str, list[jax.Array]] = {name: [] for name in (*KERNELS, *NORMS)}

    def given(d_by_name: dict[str, jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        for name, d_result in d_by_name.items():
            d_results[name].insert(0, d_result)
        return list(d_by_name.values()), [stack(blocks, name) for name in d_by_name]

    def product(layer: int, **d_by_name: jax.Array) -> jax.Array:
        return products.backward(*given(d_by_name), layer)

    def normed(norm: str, layer: int, d_around: jax.Array, **d_by_name: jax.Array) -> jax.Array:
        into, scales = kept.read[norm][layer], blocks[norm]["scale"]
        d_normed, d_x = products.backward_normed(*given(d_by_name), layer, scales, into, d_around)
        d_results[norm].insert(0, d_normed)
        return d_x

    for layer in reversed(range(config.num_layers)):
        _, pullback = jax.vjp(_gated, kept.made["gate"][layer], kept.made["up"][layer])
        d_gate, d_up = pullback(product(layer, down=d_x))
        d_x = normed("mlp_norm", layer, d_x, gate=d_gate, up=d_up)
        d_heads = product(layer, output=d_x).reshape(-1, config.num_kv_heads, *_shared(config))
        d_x = normed("attention_norm", layer, d_x, value=jnp.sum(d_heads, axis=2).reshape(d_x.shape[0], -1))

    # All layers at once, and apart from the way forward: XLA would do this one by one inside the chain.
    read: dict[str, Any] = jax.lax.optimization_barrier({name: jnp.stack(kept.read[name]) for name in kept.read})
    units = {name: rms_norm(read[name], jnp.ones(()), config.rms_norm_eps) for name in NORMS}
    operands = {name: units[name] * blocks[name]["scale"][:, None, :] for name in NORMS}
    read |= {"value": operands["attention_norm"], "gate": operands["mlp_norm"], "up": operands["mlp_norm"]}
    return Gradients(
        {name: (read[name], jnp.stack(d_results[name])) for name in KERNELS},
        {name: jnp.sum(units[name] * jnp.stack(d_results[name]), axis=1) for name in NORMS},
        d_x,
    )


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
    x, kept = forward(config, _products(config, precision), blocks, x)
    return x, (kept, blocks)


def _backward(
    config: LlamaConfig, precision: jax.lax.PrecisionLike, saved: Any, d_x: jax.Array
) -> tuple[Any, jax.Array]:
    kept, blocks = saved
    found = backward(config, _products(config, precision), blocks, kept, d_x)
    gradients = jax.tree.map(jnp.zeros_like, blocks)  # and so it stays for queries and keys
    for name, (part, kernel) in KERNELS.items():
        gradients[part][kernel]["kernel"] = jnp.einsum("lti,lto->lio", *found.kernels[name], precision=precision)
    for name in NORMS:
        gradients[name]["scale"] = found.norms[name]
    return gradients, found.x


through_blocks.defvjp(_forward, _backward)


def _products(config: LlamaConfig, precision: jax.lax.PrecisionLike) -> Products:
    dot = partial(jnp.dot, precision=precision)

    def forward(x: jax.Array, stacks: list[jax.Array], layer: int, scales: jax.Array | None) -> list[jax.Array]:
        operand = x if scales is None else rms_norm(x, scales[layer], config.rms_norm_eps)
        return [dot(operand, stack[layer]) for stack in stacks]

    def backward(gradients: list[jax.Array], stacks: list[jax.Array], layer: int) -> jax.Array:
        products = [dot(d, stack[layer].T) for d, stack in zip(gradients, stacks, strict=True)]
        return sum(products[1:], start=products[0])

    def backward_normed(
        gradients: list[jax.Array],
        stacks: list[jax.Array],
        layer: int,
        scales: jax.Array,
        x: jax.Array,
        d_around: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        d_normed = backward(gradients, stacks, layer)
        _, pullback = jax.vjp(lambda x: rms_norm(x, scales[layer], config.rms_norm_eps), x)
        return d_normed, d_around + pullback(d_normed)[0]

    return Products(forward, backward, backward_normed)


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _shared(config: LlamaConfig) -> tuple[int, int]:
    """How many query heads read a value head, and its size."""
    return config.num_heads // config.num_kv_heads, config.head_dim


def _to_query_heads(config: LlamaConfig, value: jax.Array) -> jax.Array:
    """`[tokens, kv_heads * head_dim]` -> `[tokens, heads * head_dim]`: what attention to one key gives each head."""
    heads = value.reshape(-1, config.num_kv_heads, 1, config.head_dim)
    return jnp.broadcast_to(heads, (len(value), config.num_kv_heads, *_shared(config))).reshape(len(value), -1)
