"""The time loop of New-LLM in its plain form, for any device and any cell: the definition, and a backward pass from it.

`scan_plain` is the definition, differentiated by JAX, which adds to the gradient of every kernel at every step. The
backward pass here gives the same gradients, and leaves in the time loop only what depends on the step after it:

    forward    every step stores the context before it and the pre-activation of every dense layer
    backward   1. time loop, last step first: `step` is replayed with the stored pre-activations in place of its
                  products, and pulled back by `jax.vjp`. What is not a product is cheap and computed again.
               2. all steps at once: the inputs of the dense layers by another replay; the gradient of a kernel is one
                  product of those with the gradients of the pre-activations.

So an option of `cell.step` needs no gradient of its own here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from newllm_jax.config import Precision
from newllm_jax.newllm.recurrence.cell import CellParams, CellSpec, dense_layer, step
from newllm_jax.newllm.recurrence.gradients import Gradients, bias_gradient, kernel_gradient
from newllm_jax.training.precision import dot

# (input [B, in], kernel [in, out], stored pre-activation [B, out]) -> pre-activation
Product: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Residuals(NamedTuple):
    """What the forward pass stores for the backward pass.

    Attributes:
      contexts: `[T, B, C]`, before each step.
      pre_activations: of each dense layer, `[T, B, H]`, and of the gates, `[T, B, 3 * C]`.
    """

    contexts: jax.Array
    pre_activations: tuple[jax.Array, ...]


def scan_plain(
    spec: CellSpec, params: CellParams, context: jax.Array, tokens: jax.Array, seeds: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """All steps, as plainly as they can be written.

    Args:
      context: `[B, C]`, before the first token.
      tokens: `[T, B, H]`, the embedding's part of the first layer, its bias included.
      seeds: `dropout_seeds`; None without dropout.

    Returns:
      The last context vector `[B, C]`, and the last layer's activations `[T, B, H]`.
    """

    def body(context: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return step(spec, params, context, *inputs, seeds)

    return jax.lax.scan(body, context, (tokens, jnp.arange(len(tokens))))


def forward(
    spec: CellSpec, params: CellParams, context: jax.Array, tokens: jax.Array, seeds: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    """The results of `scan_plain`, and what the backward pass needs."""
    layer = dense_layer(spec.precision)

    def body(
        context: jax.Array, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, Residuals]]:  # fmt: skip
        stored: list[jax.Array] = []

        def dense(number: int, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            stored.append(layer(number, x, kernel, bias))
            return stored[-1]

        after, output = step(spec, params, context, *inputs, seeds, dense)
        return after, (output, Residuals(context, tuple(stored)))

    last, (outputs, residuals) = jax.lax.scan(body, context, (tokens, jnp.arange(len(tokens))))
    return (last, outputs), residuals


def backward(
    spec: CellSpec,
    params: CellParams,
    residuals: Residuals,
    seeds: jax.Array | None,
    d_last: jax.Array,
    d_outputs: jax.Array,
) -> Gradients:
    """The gradients of all inputs.

    Args:
      d_last, d_outputs: gradients of the results of `forward`, like them.
    """
    times = jnp.arange(len(d_outputs))

    def replay(product: Product, norm: Any, time: jax.Array, context: jax.Array, stored: Any) -> Any:
        """One step again; `product` gives a pre-activation from a layer's input, its kernel and what was stored."""

        def dense(number: int, x: jax.Array, kernel: jax.Array, _: jax.Array) -> jax.Array:
            return product(x, kernel, stored[number])

        return step(spec, params._replace(norm=norm), context, jnp.zeros(()), time, seeds, dense)

    # 1. The time loop.
    def body(d_context: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        time, (context, stored), d_output = inputs
        replayed = partial(replay, partial(_stored_product, spec.precision), params.norm, time)
        _, pullback = jax.vjp(replayed, context, stored)
        d_before, d_pre = pullback((d_context, d_output))
        return d_before, (d_pre, d_context)

    d_first, (d_pre, d_contexts) = jax.lax.scan(body, d_last, (times, residuals, d_outputs), reverse=True)

    # 2. All steps at once.
    def layer_inputs(time: jax.Array, context: jax.Array, stored: Any) -> list[jax.Array]:
        inputs: list[jax.Array] = []

        def product(x: jax.Array, _: jax.Array, stored: jax.Array) -> jax.Array:
            inputs.append(x)
            return stored

        replay(product, params.norm, time, context, stored)
        return inputs

    def contexts_after(norm: Any) -> jax.Array:
        return jax.vmap(partial(replay, lambda x, kernel, stored: stored, norm))(times, *residuals)[0]

    inputs = jax.vmap(layer_inputs)(times, *residuals)
    kernels = [kernel_gradient(x, d, spec.precision) for x, d in zip(inputs, d_pre, strict=True)]
    biases = [bias_gradient(d) for d in d_pre]
    _, pullback = jax.vjp(contexts_after, params.norm)
    return Gradients(
        params=CellParams(
            context_in=kernels[0],
            hidden=tuple(zip(kernels[1:-1], biases[1:-1], strict=True)),
            gates=(kernels[-1], biases[-1]),
            norm=pullback(d_contexts)[0],
        ),
        context=d_first,
        tokens=d_pre[0],
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stored_product(precision: Precision, x: jax.Array, kernel: jax.Array, stored: jax.Array) -> jax.Array:
    """A dense layer whose pre-activation is known: as `stored` is its value, `x @ kernel` is never computed.

    Its gradient is that of the product by x, and handed to `stored`, from where the gradient of the kernel is formed.
    """
    return stored


def _stored_forward(
    precision: Precision, x: jax.Array, kernel: jax.Array, stored: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return stored, kernel


def _stored_backward(
    precision: Precision, kernel: jax.Array, d_pre: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    return dot(d_pre, kernel.T, precision), None, d_pre


_stored_product.defvjp(_stored_forward, _stored_backward)
