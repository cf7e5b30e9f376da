"""The blocks of a Llama on texts of one token, as a stage of CASCADE reads them.

Attention to one key gives it the weight 1, whatever the query: it passes the value on, to all query heads that share
the value head. So no query, key or softmax is computed, and their kernels have no gradient. A block is

    v    = RMSNorm(x) W_value
    x    = x + repeat(v) W_output                               repeat: each value head, once per query head
    g, u = RMSNorm(x) W_gate, RMSNorm(x) W_up
    x    = x + (silu(g) * u) W_down

with the parameters of `smollm.model.Backbone`, and computes the same. The gradient of each kernel is one product for
all layers, formed after the chain back through the layers instead of inside it.

In shapes, B is the tokens of a batch, L the layers, H the hidden size. A *product* is one of the five of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from newllm_jax.config import Precision
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import rms_norm
from newllm_jax.training.precision import PRECISIONS

KERNELS = {  # a product's name -> where its kernel is in the parameters of the blocks
    "value": ("attention", "v_proj"),
    "output": ("attention", "o_proj"),
    "gate": ("mlp", "gate_proj"),
    "up": ("mlp", "up_proj"),
    "down": ("mlp", "down_proj"),
}
NORMS = ("attention_norm", "mlp_norm")


class Products(NamedTuple):
    """An implementation of the products with one layer's kernels, which lie in stacks `[L, in, out]`.

    With W the layer's kernel of a stack, n(x) the RMSNorm of x by the layer's scale, and d_x the gradient of x:

    Attributes:
      forward: (x `[B, in]`, stacks, layer, the norm's scales `[L, in]` or None) -> for each stack `[B, out]`: n(x) W,
        or x W without scales.
      backward: (for each stack the gradient d_y `[B, out]` of its result, stacks, layer) -> d_x `[B, in]`, the sum of
        d_y W^T over the stacks; of results that had no norm.
      norm_backward: (gradients as above, stacks, layer, scales, x, the gradient `[B, in]` that comes to x by the
        residual stream) -> the gradients of n(x), as above, and of x, both `[B, in]`; the latter is the sum of what
        comes through the norm and by the residual stream.
    """

    forward: Callable[[jax.Array, list[jax.Array], int, jax.Array | None], list[jax.Array]]
    backward: Callable[[list[jax.Array], list[jax.Array], int], jax.Array]
    norm_backward: Callable[
        [list[jax.Array], list[jax.Array], int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]
    ]


class Residuals(NamedTuple):
    """Activations saved for the backward pass, by name, for each layer one `[B, ...]`.

    Attributes:
      inputs: of the norms, and of the products that no norm precedes, `output` and `down`.
      pre_activations: g and u, the results of the products `gate` and `up`.
    """

    inputs: dict[str, list[jax.Array]]
    pre_activations: dict[str, list[jax.Array]]


class Gradients(NamedTuple):
    """The gradients of the blocks' parameters and of their input; those of the kernels in two factors.

    Attributes:
      kernel_factors: by product, its left operand x `[L, B, in]` and the gradient d_y `[L, B, out]` of its result; the
        gradient of the kernels is x^T d_y.
      norm_scales: by norm, `[L, H]`.
      x: of the input of the first layer, `[B, H]`.
    """

    kernel_factors: dict[str, tuple[jax.Array, jax.Array]]
    norm_scales: dict[str, jax.Array]
    x: jax.Array


def kernel_stack(blocks: Any, name: str) -> jax.Array:
    """The kernels of a product, `[L, in, out]`."""
    part, kernel = KERNELS[name]
    return blocks[part][kernel]["kernel"]


def forward(config: LlamaConfig, products: Products, blocks: Any, x: jax.Array) -> tuple[jax.Array, Residuals]:
    """The residual stream `[B, H]` after all layers, from that before the first."""
    residuals = Residuals({name: [] for name in ("output", "down", *NORMS)}, {"gate": [], "up": []})

    def multiply(layer: int, x: jax.Array, *names: str, norm: str = "") -> list[jax.Array]:
        """RMSNorm(x) W for the kernel W of each name; without a norm x W."""
        residuals.inputs[norm or names[0]].append(x)
        scales = blocks[norm]["scale"] if norm else None
        return products.forward(x, [kernel_stack(blocks, name) for name in names], layer, scales)

    for layer in range(config.num_layers):
        [value] = multiply(layer, x, "value", norm="attention_norm")
        [attended] = multiply(layer, _to_query_heads(config, value), "output")
        x = x + attended
        gate, up = multiply(layer, x, "gate", "up", norm="mlp_norm")
        residuals.pre_activations["gate"].append(gate)
        residuals.pre_activations["up"].append(up)
        [lowered] = multiply(layer, _swiglu(gate, up), "down")
        x = x + lowered
    return x, residuals


def backward(config: LlamaConfig, products: Products, blocks: Any, residuals: Residuals, d_x: jax.Array) -> Gradients:
    """The gradients of the blocks, from the gradient `[B, H]` of the result of `forward`."""
    inputs = residuals.inputs
    d_results: dict[str, list[jax.Array]] = {name: [] for name in (*KERNELS, *NORMS)}

    def operands_of(d_by_name: dict[str, jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """The gradients of products and their kernels, for `Products`; the former are also recorded."""
        for name, d_result in d_by_name.items():
            d_results[name].insert(0, d_result)
        return list(d_by_name.values()), [kernel_stack(blocks, name) for name in d_by_name]

    def product_backward(layer: int, **d_by_name: jax.Array) -> jax.Array:
        """The gradient of the input of a product, from that of its result."""
        return products.backward(*operands_of(d_by_name), layer)

    def norm_backward(norm: str, layer: int, d_residual: jax.Array, **d_by_name: jax.Array) -> jax.Array:
        """The gradient of the residual stream before a norm and the products that follow it."""
        x, scales = inputs[norm][layer], blocks[norm]["scale"]
        d_normed, d_x = products.norm_backward(*operands_of(d_by_name), layer, scales, x, d_residual)
        d_results[norm].insert(0, d_normed)
        return d_x

    for layer in reversed(range(config.num_layers)):
        gate, up = (residuals.pre_activations[name][layer] for name in ("gate", "up"))
        _, swiglu_backward = jax.vjp(_swiglu, gate, up)
        d_gate, d_up = swiglu_backward(product_backward(layer, down=d_x))
        d_x = norm_backward("mlp_norm", layer, d_x, gate=d_gate, up=d_up)
        d_value = _sum_of_query_heads(config, product_backward(layer, output=d_x))
        d_x = norm_backward("attention_norm", layer, d_x, value=d_value)

    # Here the norms are computed again, for all layers at once. Without the barrier, XLA would reuse those of the
    # forward pass, and compute what follows layer by layer inside the chain.
    saved = jax.lax.optimization_barrier({name: jnp.stack(inputs[name]) for name in inputs})
    units = {name: rms_norm(saved[name], jnp.ones(()), config.rms_norm_eps) for name in NORMS}
    normed = {name: units[name] * blocks[name]["scale"][:, None, :] for name in NORMS}
    operands = {"value": normed["attention_norm"], "gate": normed["mlp_norm"], "up": normed["mlp_norm"], **saved}
    return Gradients(
        kernel_factors={name: (operands[name], jnp.stack(d_results[name])) for name in KERNELS},
        norm_scales={name: jnp.sum(units[name] * jnp.stack(d_results[name]), axis=1) for name in NORMS},
        x=d_x,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_blocks(config: LlamaConfig, precision: Precision, blocks: Any, x: jax.Array) -> jax.Array:
    """The residual stream `[B, H]` after all layers.

    Args:
      precision: of the products.
      blocks: the parameters of `Backbone`'s blocks, stacked by layer.
      x: `[B, H]`, the residual stream before the first layer.
    """
    return _forward(config, precision, blocks, x)[0]


def _forward(config: LlamaConfig, precision: Precision, blocks: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    x, residuals = forward(config, _plain_products(config, precision), blocks, x)
    return x, (residuals, blocks)


def _backward(config: LlamaConfig, precision: Precision, saved: Any, d_x: jax.Array) -> tuple[Any, jax.Array]:
    residuals, blocks = saved
    gradients = backward(config, _plain_products(config, precision), blocks, residuals, d_x)
    d_blocks = jax.tree.map(jnp.zeros_like, blocks)  # the gradients of queries and keys stay 0
    for name, (part, kernel) in KERNELS.items():
        x, d_y = gradients.kernel_factors[name]
        d_blocks[part][kernel]["kernel"] = jnp.einsum("lbi,lbo->lio", x, d_y, precision=PRECISIONS[precision])
    for name in NORMS:
        d_blocks[name]["scale"] = gradients.norm_scales[name]
    return d_blocks, gradients.x


run_blocks.defvjp(_forward, _backward)


def _plain_products(config: LlamaConfig, precision: Precision) -> Products:
    """The products as XLA computes them, on any device."""
    dot = partial(jnp.dot, precision=PRECISIONS[precision])

    def forward(x: jax.Array, stacks: list[jax.Array], layer: int, scales: jax.Array | None) -> list[jax.Array]:
        operand = x if scales is None else rms_norm(x, scales[layer], config.rms_norm_eps)
        return [dot(operand, stack[layer]) for stack in stacks]

    def backward(d_results: list[jax.Array], stacks: list[jax.Array], layer: int) -> jax.Array:
        d_inputs = [dot(d_y, stack[layer].T) for d_y, stack in zip(d_results, stacks, strict=True)]
        return sum(d_inputs[1:], start=d_inputs[0])

    def norm_backward(
        d_results: list[jax.Array],
        stacks: list[jax.Array],
        layer: int,
        scales: jax.Array,
        x: jax.Array,
        d_residual: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        d_normed = backward(d_results, stacks, layer)
        _, pullback = jax.vjp(lambda x: rms_norm(x, scales[layer], config.rms_norm_eps), x)
        return d_normed, d_residual + pullback(d_normed)[0]

    return Products(forward, backward, norm_backward)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SwiGLU's activation (Shazeer 2020), `[B, intermediate]`."""
    return jax.nn.silu(gate) * up


def _query_heads(config: LlamaConfig) -> tuple[int, int]:
    """Query heads that share a value head, and the size of a head."""
    return config.num_heads // config.num_kv_heads, config.head_dim


def _to_query_heads(config: LlamaConfig, value: jax.Array) -> jax.Array:
    """`[B, kv_heads * head_dim]` -> `[B, heads * head_dim]`: the value that attention to one key gives each head."""
    heads = value.reshape(-1, config.num_kv_heads, 1, config.head_dim)
    return jnp.broadcast_to(heads, (len(value), config.num_kv_heads, *_query_heads(config))).reshape(len(value), -1)


def _sum_of_query_heads(config: LlamaConfig, d_heads: jax.Array) -> jax.Array:
    """The gradient of the values `[B, kv_heads * head_dim]` from that of `_to_query_heads`."""
    heads = d_heads.reshape(-1, config.num_kv_heads, *_query_heads(config))
    return jnp.sum(heads, axis=2).reshape(len(d_heads), -1)
