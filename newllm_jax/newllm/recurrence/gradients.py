"""What the backward passes of the time loop and of the head share: result types, gradients over all steps at once."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from newllm_jax.config import Precision
from newllm_jax.newllm.recurrence.cell import CellParams
from newllm_jax.training.precision import product


class Gradients(NamedTuple):
    """The gradients of the inputs of a time loop.

    Attributes:
      params: like the weights.
      context: `[B, C]`, of the context before the first step.
      tokens: `[T, B, H]`, of the tokens' part of the first layer.
    """

    params: CellParams
    context: jax.Array
    tokens: jax.Array


def relu_backward(activations: jax.Array, gradient: jax.Array, scale: Any) -> jax.Array:
    """The gradient of a pre-activation, from that of the activation after ReLU and dropout.

    An activation is positive exactly where both passed it on; one below 3e-8 that is stored in fp16 is 0.

    Args:
      scale: `CellDropout.scale`, by which dropout multiplied what it passed on.
    """
    return jnp.where(activations > 0, gradient * scale, 0)


def kernel_gradient(inputs: jax.Array, gradients: jax.Array, precision: Precision) -> jax.Array:
    """`[in, out]`: over all steps and texts, the products of a layer's inputs and its pre-activations' gradients.

    Args:
      inputs: `[T, B, in]`.
      gradients: `[T, B, out]`.
    """
    transposed = partial(_transposed_first, precision=precision)
    direct = partial(product, "tbi,tbo->io", precision=precision)
    return jax.lax.platform_dependent(inputs.astype(gradients.dtype), gradients, cpu=transposed, default=direct)


def _transposed_first(inputs: jax.Array, gradients: jax.Array, precision: Precision) -> jax.Array:
    """For CPUs, where a product with a transposed operand takes longer than a copy and a plain product."""
    transposed = jax.lax.optimization_barrier(inputs.reshape(-1, inputs.shape[-1]).T)  # else XLA undoes the copy
    return product("in,no->io", transposed, gradients.reshape(-1, gradients.shape[-1]), precision)


def bias_gradient(gradients: jax.Array) -> jax.Array:
    """`[out]`: the sum of the pre-activations' gradients `[T, B, out]` over all steps and texts."""
    return jnp.sum(gradients, (0, 1), dtype=jnp.float32)


def gradients_over_steps(
    stored: Any, found: Any, read: jax.Array, d_context: jax.Array, precision: Precision
) -> Gradients:  # fmt: skip
    """The gradients of all inputs, from what the GPU kernels wrote of every step, rows that fill up groups included.

    Args:
      stored: the forward kernel's results, `contexts` and `outputs` among them.
      found: the backward kernel's, `d_pre`, `d_first`, `d_gates` and `d_norm` among them.
      read: `[L - 1, T, B, H]`, what the layers after the first multiplied.
      d_context: `[texts, C]`, of the context before the first step; without those rows.
    """
    kernels = product("ltbi,ltbo->lio", read, found.d_pre, precision)
    biases = jnp.sum(found.d_pre, (1, 2), dtype=jnp.float32)
    return Gradients(
        params=CellParams(
            context_in=kernel_gradient(stored.contexts, found.d_first, precision),
            hidden=tuple((kernels[layer], biases[layer]) for layer in range(len(kernels))),
            gates=dense_gradient(stored.outputs, found.d_gates, precision),
            norm=(jnp.sum(found.d_norm[0], 0), jnp.sum(found.d_norm[1], 0)),
        ),
        context=d_context,
        tokens=found.d_first[:, : len(d_context)].astype(jnp.float32),
    )


def dense_gradient(inputs: jax.Array, gradients: jax.Array, precision: Precision) -> tuple[jax.Array, jax.Array]:
    """Of kernel and bias of a dense layer; arguments of `kernel_gradient`."""
    return kernel_gradient(inputs, gradients, precision), bias_gradient(gradients)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(states: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
    """`[T, B, out]` in the type of the states `[T, B, in]`; the gradient of the kernel `[in, out]` is float32."""
    return product("tbi,io->tbo", states, kernel.astype(states.dtype), precision, states.dtype)


def _project_forward(
    states: jax.Array, kernel: jax.Array, precision: Precision
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(states, kernel, precision), (states, kernel)


def _project_backward(
    precision: Precision, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    states, kernel = saved
    d_states = product("tbo,io->tbi", gradient, kernel.astype(gradient.dtype), precision, states.dtype)
    return d_states, kernel_gradient(states, gradient, precision)


project.defvjp(_project_forward, _project_backward)
