"""The recurrence of New-LLM over a piece of text: the context vector carried through the layers, step by step.

`scan_plain` is the definition, differentiated by JAX. `scan` computes the same and has a backward pass of its own,
which leaves in the time loop only what depends on the step after it: the gradient of every weight is one large
product over all steps at the end, instead of a small one added up at every step. Its two loops are `lax.scan`s or,
where `fused` says so, a GPU kernel each.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.cell import Backward, CellParams, Forward, next_context, step
from newllm_jax.training.precision import product


def fusible(config: NewLLMConfig, precision: str) -> bool:
    """Whether training in this resolved precision can have its loops as GPU kernels.

    They need what tf32 and bf16 need, an NVIDIA GPU of compute capability 8.0; layers that cut into 16 equal parts of
    a power of two; activations that 32 bits can number; and a JAX that has Pallas's Triton backend.
    """
    cut_evenly = all(width >= 256 and width.bit_count() == 1 for width in (config.hidden_dim, config.context_dim))
    activations = config.num_layers * config.sequence_length * (config.batch_size + 64) * config.hidden_dim
    return (
        precision in ("tf32", "bf16") and cut_evenly and config.num_layers > 1 and activations < 2**31
        and importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    )  # fmt: skip


def scan_plain(
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    seeds: jax.Array | None,
    dropout: float,
    precision: jax.lax.PrecisionLike,
) -> tuple[jax.Array, jax.Array]:
    """All steps, in the plainest form.

    Args:
      context: `[batch, context]` before the first token.
      tokens: `[time, batch, hidden]`, the embedding's part of the first layer, its bias included.
      seeds: `dropout_seeds`; None without dropout.

    Returns:
      The last context vector, and the last layer's hidden states `[time, batch, hidden]`.
    """

    def body(context: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        context, states, _ = step(params, dropout, precision, context, *inputs, seeds)
        return context, states[-1]

    return jax.lax.scan(body, context, (tokens, jnp.arange(len(tokens))))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def scan(
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    seeds: jax.Array | None,
    dropout: float,
    precision: jax.lax.PrecisionLike,
    fused: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`scan_plain` with the backward pass described above.

    Args:
      fused: whether its loops are those of `fused.py`, whose hidden states are of the precision's `storage_type`.
    """
    return _forward(params, context, tokens, seeds, dropout, precision, fused)[0]


def _forward(
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    seeds: jax.Array | None,
    dropout: float,
    precision: jax.lax.PrecisionLike,
    fused: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple[CellParams, Forward, bool]]:
    loop = forward_loop
    if fused:
        from newllm_jax.newllm.fused import forward as loop
    kept = loop(params, context, tokens, seeds, dropout, precision)
    return (kept.last, kept.outputs[:, : len(kept.last)]), (params, kept, seeds is not None)


def _backward(
    dropout: float,
    precision: jax.lax.PrecisionLike,
    fused: bool,
    saved: tuple[CellParams, Forward, bool],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[CellParams, jax.Array, jax.Array, None]:
    """The chain through time gives the gradient of every pre-activation; products over all steps give the weights'."""
    params, kept, dropped = saved
    loop = backward_loop
    if fused:
        from newllm_jax.newllm.fused import backward as loop
    chain = loop(params, kept, *cotangents, 1 / (1 - dropout) if dropped else 1.0, precision)
    gradients = CellParams(
        context_in=over_steps(kept.contexts, chain.d_first, precision),
        hidden=chain.hidden,
        gates=(over_steps(kept.outputs, chain.d_gates, precision), _total(chain.d_gates)),
        norm=chain.norm,
    )
    batch = chain.d_context.shape[0]
    return gradients, chain.d_context, chain.d_first[:, :batch].astype(jnp.float32), None


scan.defvjp(_forward, _backward)


def forward_loop(
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    seeds: jax.Array | None,
    dropout: float,
    precision: jax.lax.PrecisionLike,
) -> Forward:
    """All steps forward; arguments as of `scan_plain`."""

    def body(context: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        after, states, gates = step(params, dropout, precision, context, *inputs, seeds)
        return after, (context, tuple(states), gates)

    last, (contexts, states, gates) = jax.lax.scan(body, context, (tokens, jnp.arange(len(tokens))))
    return Forward(contexts, states[:-1], gates, last, states[-1])


def backward_loop(
    params: CellParams,
    kept: Forward,
    d_last: jax.Array,
    d_outputs: jax.Array,
    scale: float,
    precision: jax.lax.PrecisionLike,
) -> Backward:
    """All steps backward.

    Args:
      d_last, d_outputs: gradients of what `forward_loop` gave.
      scale: of the activations that dropout kept.
    """
    dot = partial(jnp.dot, precision=precision)

    def through(activated: jax.Array, gradient: jax.Array) -> jax.Array:
        # An activation is positive exactly where ReLU passed it and dropout kept it.
        return jnp.where(activated > 0, gradient * scale, 0)

    def body(d_context: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        context, states, gates, d_output = inputs
        _, pullback = jax.vjp(lambda c, g: next_context(c, g, params.norm), context, gates)
        d_before, d_gates = pullback(d_context)
        d_pre = [through(states[-1], dot(d_gates, params.gates[0].T) + d_output)]
        for (kernel, _), activated in zip(params.hidden[::-1], states[-2::-1], strict=True):
            d_pre.append(through(activated, dot(d_pre[-1], kernel.T)))
        return d_before + dot(d_pre[-1], params.context_in.T), (tuple(d_pre[::-1]), d_gates, d_context)

    inputs = kept.contexts, (*kept.states, kept.outputs), kept.gates, d_outputs
    d_first, (d_pre, d_gates, d_contexts) = jax.lax.scan(body, d_last, inputs, reverse=True)
    _, norm_pullback = jax.vjp(lambda norm: next_context(kept.contexts, kept.gates, norm), params.norm)
    pairs = zip(kept.states, d_pre[1:], strict=True)
    return Backward(
        d_context=d_first,
        d_first=d_pre[0],
        d_gates=d_gates,
        hidden=tuple((over_steps(x, d, precision), _total(d)) for x, d in pairs),
        norm=norm_pullback(d_contexts)[0],
    )


def over_steps(inputs: jax.Array, gradients: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """The gradient of a kernel from its inputs and the gradients of its products, over all steps and texts."""
    return product("tbi,tbo->io", inputs.astype(gradients.dtype), gradients, precision)


def _total(gradients: jax.Array) -> jax.Array:
    return jnp.sum(gradients, (0, 1), dtype=jnp.float32)
