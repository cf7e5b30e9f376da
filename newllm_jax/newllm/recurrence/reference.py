"""The time loop of New-LLM in its plain form, for any device and any cell: the definition, and a backward pass from it.

`scan_plain` is the definition, differentiated by JAX, which adds to the gradient of every kernel at every step. The
backward pass here gives the same gradients, and leaves in the time loop only what depends on the step after it:

    forward    every step stores the context before it and the result of every layer
    backward   1. time loop, last step first: `step` is replayed with the stored results in place of the layers, and
                  pulled back by `jax.vjp`. What is not a layer is cheap and computed again.
               2. all steps at once: the inputs of the layers by another replay; the gradient of a kernel is one product
                  of those with the gradients of the pre-activations.

So an option of `cell.step` outside its layers needs no gradient of its own here, if it reads neither token nor time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec, compute_layer, step
from newllm_jax.newllm.recurrence.gradients import Gradients, dense_gradient, relu_backward
from newllm_jax.training.precision import dot, operand_type

# (number of the layer, its input [B, in], its kernel [in, out], its stored result [B, out]) -> its result
Replay: TypeAlias = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


class Residuals(NamedTuple):
    """What the forward pass stores for the backward pass.

    Attributes:
      contexts: `[T, B, C]`, before each step.
      layers: the activations of each hidden layer, `[T, B, H]`, and the gates' pre-activations, `[T, B, 3 * C]`. The
        activations of all layers but the last have the type of the products' operands.
    """

    contexts: jax.Array
    layers: tuple[jax.Array, ...]


def supports(_spec: CellSpec, _batch: int, _steps: int) -> bool:
    """Whether this form computes the cell: always."""
    return True


def scan_plain(
    spec: CellSpec, params: CellParams, context: jax.Array, tokens: jax.Array, dropout: CellDropout
) -> tuple[jax.Array, jax.Array]:
    """All steps, as plainly as they can be written.

    Args:
      context: `[B, C]`, before the first token.
      tokens: `[T, B, H]`, the embedding's part of the first layer, its bias included.

    Returns:
      The last context vector `[B, C]`, and the last hidden layer's activations `[T, B, H]`.
    """

    def body(context: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return step(spec, params, context, *inputs, dropout)

    return jax.lax.scan(body, context, (tokens, jnp.arange(len(tokens))))


def forward(
    spec: CellSpec, params: CellParams, context: jax.Array, tokens: jax.Array, dropout: CellDropout
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    """The results of `scan_plain`, and what the backward pass needs.

    In half precision, the outputs of a residual cell are sums of activations as they are stored; gates and contexts
    come from the unrounded ones.
    """
    params, stored_type = params.rounded(spec.precision), operand_type(spec.precision)

    def body(context: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Residuals]:
        (token, time), results = inputs, list[jax.Array]()

        def layer(*arguments: Any) -> jax.Array:
            results.append(compute_layer(spec, time, dropout, *arguments))
            return results[-1]

        after, _ = step(spec, params, context, token, time, dropout, layer)
        *below, last, gates = results
        return after, Residuals(context, (*(x.astype(stored_type) for x in below), last, gates))

    last, residuals = jax.lax.scan(body, context, (tokens, jnp.arange(len(tokens))))
    _, outputs = _replay(spec, params, _stored_result, params.norm, *residuals)
    return (last, outputs), residuals


def backward(
    spec: CellSpec,
    params: CellParams,
    residuals: Residuals,
    dropout: CellDropout,
    d_last: jax.Array,
    d_outputs: jax.Array,
) -> Gradients:
    """The gradients of all inputs.

    Args:
      d_last, d_outputs: gradients of the results of `forward`, like them.
    """
    params, stored_type = params.rounded(spec.precision), operand_type(spec.precision)

    # 1. The time loop.
    def body(d_context: jax.Array, inputs: tuple[Residuals, jax.Array]) -> tuple[jax.Array, Any]:
        residuals, d_output = inputs
        layer = partial(_stored_layer, spec, dropout.scale)
        _, pullback = jax.vjp(partial(_replay, spec, params, layer, params.norm), *residuals)
        d_before, d_pre = pullback((d_context, d_output))
        return d_before, ([d.astype(stored_type) for d in d_pre], d_context)

    d_first, (d_pre, d_contexts) = jax.lax.scan(body, d_last, (residuals, d_outputs), reverse=True)

    # 2. All steps at once.
    inputs: list[jax.Array] = []

    def record_input(number: int, x: jax.Array, kernel: jax.Array, stored: jax.Array) -> jax.Array:
        inputs.append(x)
        return stored.astype(jnp.float32)

    _replay(spec, params, record_input, params.norm, *residuals)
    _, pullback = jax.vjp(lambda norm: _replay(spec, params, _stored_result, norm, *residuals)[0], params.norm)
    kernels_and_biases = [dense_gradient(x, d, spec.precision) for x, d in zip(inputs, d_pre, strict=True)]
    return Gradients(
        params=CellParams(
            context_in=kernels_and_biases[0][0],
            hidden=tuple(kernels_and_biases[1:-1]),
            gates=kernels_and_biases[-1],
            norm=pullback(d_contexts)[0],
        ),
        context=d_first,
        tokens=d_pre[0].astype(jnp.float32),
    )


def _replay(
    spec: CellSpec, params: CellParams, layer: Replay, norm: Any, context: jax.Array, stored: Any
) -> tuple[jax.Array, jax.Array]:
    """`step` again, `layer` giving the result of each layer from what was stored; of one step, or of all at once."""

    def replayed(number: int, x: jax.Array, kernel: jax.Array, _: jax.Array) -> jax.Array:
        return layer(number, x, kernel, stored[number])

    unused = jnp.zeros((), jnp.int32)  # a replayed layer reads neither token nor time
    return step(spec, params._replace(norm=norm), context, unused, unused, CellDropout(), replayed)


def _stored_result(number: int, x: jax.Array, kernel: jax.Array, stored: jax.Array) -> jax.Array:
    return stored.astype(jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _stored_layer(
    spec: CellSpec, scale: Any, number: int, x: jax.Array, kernel: jax.Array, stored: jax.Array
) -> jax.Array:
    """A layer whose result is known: its value is `stored`, and the product `x @ kernel` is never computed.

    A trick brings the gradient of the pre-activations out of `jax.vjp`: it is returned in the place of the gradient of
    `stored`. Those of kernel and bias are formed from it. The gradient of x is that of the layer.

    Args:
      scale: `CellDropout.scale`.
    """
    return stored.astype(jnp.float32)


def _stored_layer_forward(
    spec: CellSpec, scale: Any, number: int, x: jax.Array, kernel: jax.Array, stored: jax.Array
) -> tuple[jax.Array, Any]:
    return stored.astype(jnp.float32), (scale, kernel, stored)


def _stored_layer_backward(
    spec: CellSpec, number: int, saved: Any, d_result: jax.Array
) -> tuple[None, jax.Array, None, jax.Array]:
    scale, kernel, stored = saved
    d_pre = d_result if number == spec.num_layers else relu_backward(stored, d_result, scale)
    return None, dot(d_pre, kernel.T, spec.precision), None, d_pre.astype(stored.dtype)


_stored_layer.defvjp(_stored_layer_forward, _stored_layer_backward)
