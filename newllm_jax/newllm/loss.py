"""Cross-entropy over the targets that are words: the training loss, and the perplexity's logarithm.

The logits are the largest arrays of an update. JAX would write their gradient in float32 and convert it for every
product; here it is written once, in the type in which the products read it. Those of a large vocabulary are computed in
parts: the loss of some steps with its gradient, then of the next steps, so that no array holds all logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.config import NewLLMConfig, Precision
from newllm_jax.newllm.dropout import Rate
from newllm_jax.newllm.model import IMPOSSIBLE, ContextVectorLM
from newllm_jax.newllm.recurrence.gradients import kernel_gradient
from newllm_jax.newllm.tokenizer import PAD
from newllm_jax.training.gradient import LossFn, Part
from newllm_jax.training.losses import Sums
from newllm_jax.training.precision import product, storage_type
from newllm_jax.training.split import Carry
from newllm_jax.training.step import Params

LOGITS_AT_ONCE = 2**25  # 128 MiB; those of the published models are fewer
PARTS_SCALE = 2.0**10  # so that in fp16 no probability above 1e-10 becomes 0
COLUMNS = 64  # a multiple of so many columns is what a GPU's matrix products are fast with


def initial_carry(config: NewLLMConfig, rows: int) -> Carry:
    """What the loss gets with the first batch: of a stream in `rows` the context vectors before it, else None."""
    return {"context": jnp.zeros((rows, config.context_dim))} if config.text == "stream" else None


def next_word_loss(model: ContextVectorLM, rates: Mapping[str, Rate] | None = None) -> LossFn:
    """The loss of New-LLM as the update loop needs it: sums over the targets of a batch that are not padding.

    Its batch is `ids [B, T + 1]`: inputs are `ids[:, :-1]`, targets `ids[:, 1:]`. A key turns dropout on. The carry is
    the context vector after the batch, for the next piece of a stream; None where each example is a text of its own.

    Args:
      rates: of dropout in the place of the model's, of the same kinds; they can be traced.
    """

    def loss(
        params: Params, ids: jax.Array, present: jax.Array, key: jax.Array | None, carry: Carry,
        part: Part | None = None,
    ) -> tuple[Sums, Carry]:  # fmt: skip
        ids, variables = ids.astype(jnp.int32), {"params": params}
        masked = model if part is None else model.clone(mask_texts=part.whole)
        context, first_text = carry and carry["context"], None if part is None else part.first
        states, last = masked.apply(  # type: ignore[misc]
            variables, ids[:, :-1], context, deterministic=key is None, rates=rates, first_text=first_text,
            method="hidden_states", rngs=None if key is None else {"dropout": key},
        )  # fmt: skip
        states, kernel, bias = model.apply(variables, states, method="head")  # type: ignore[misc]
        targets = ids[:, 1:].T
        counted = (targets != PAD) & present
        parts = logit_parts(len(targets), len(ids), len(bias))
        compute = cross_entropy if parts == 1 else partial(cross_entropy_in_parts, parts)
        return compute(model.precision, kernel, bias, states, targets, counted), carry and {"context": last}

    return loss


def logit_parts(steps: int, texts: int, vocabulary_size: int) -> int:
    """In how many parts of the steps the logits are computed: the fewest that are not too large."""
    return -(-steps // max(LOGITS_AT_ONCE // (texts * vocabulary_size), 1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
    precision: Precision,
    kernel: jax.Array,
    bias: jax.Array,
    states: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
) -> Sums:
    """Sums over the `counted` targets; a target is hit where its logit is the largest, alone or not.

    Args:
      precision: of the products.
      kernel, bias: of the logits, `[H, V]` and `[V]`.
      states: hidden states `[T, B, H]`.
      targets: the ids that follow, `[T, B]`.
      counted: bool `[T, B]`.
    """
    return _forward(precision, kernel, bias, states, targets, counted)[0]


def _forward(
    precision: Precision,
    kernel: jax.Array,
    bias: jax.Array,
    states: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
) -> tuple[Sums, Any]:
    kernel = kernel.astype(states.dtype)
    logits = product("tbh,hv->tbv", states, kernel, precision) + bias
    largest, normalizer = _log_normalizer(logits)
    label = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    sums = Sums(
        loss=jnp.sum(normalizer - label, where=counted),
        hits=jnp.sum((label == largest) & counted),
        count=jnp.sum(counted),
    )
    return sums, (kernel, states, targets, counted, logits, normalizer)


def _log_normalizer(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit and the logarithm of the sum of exponentials, over the last axis."""
    return jax.lax.platform_dependent(logits, cpu=_in_two_passes, default=_in_one_pass)


def _in_two_passes(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(logits, -1)
    return largest, largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), -1))


def _in_one_pass(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For GPUs, which wait for memory; a CPU would compute for longer than it reads."""

    def join(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (largest, total), (value, added) = one, other
        new = jnp.maximum(largest, value)
        return new, total * jnp.exp(largest - new) + added * jnp.exp(value - new)

    least = jnp.finfo(logits.dtype).min  # not -inf, whose difference from itself is no number
    start = jnp.asarray(least, logits.dtype), jnp.zeros((), logits.dtype)
    largest, total = jax.lax.reduce((logits, jnp.ones_like(logits)), start, join, (logits.ndim - 1,))
    return largest, largest + jnp.log(total)


def _backward(precision: Precision, saved: Any, cotangents: Sums) -> tuple[Any, ...]:
    kernel, states, targets, counted, logits, normalizer = saved
    named = jax.nn.one_hot(targets, logits.shape[-1])
    weight = jnp.where(counted, cotangents.loss, 0)[..., None]
    d_logits = ((jnp.exp(logits - normalizer[..., None]) - named) * weight).astype(storage_type(precision))
    d_logits = jax.lax.optimization_barrier(d_logits)  # else XLA computes them again for the sum, in float32
    d_states = product("tbv,hv->tbh", d_logits, kernel.astype(d_logits.dtype), precision, states.dtype)
    d_bias = jnp.sum(d_logits, (0, 1), dtype=jnp.float32)
    # Else XLA joins this product with that of the gates, which reads the same states, and copies both to do so.
    states = jax.lax.optimization_barrier(states)
    return kernel_gradient(states, d_logits, precision), d_bias, d_states, None, None


cross_entropy.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross_entropy_in_parts(
    parts: int,
    precision: Precision,
    kernel: jax.Array,
    bias: jax.Array,
    states: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
) -> Sums:
    """`cross_entropy`, of so many equal parts of the steps one after the other."""
    kernel, bias = _filled_up(kernel, bias, states.dtype)

    def add(sums: Sums, part: Any) -> tuple[Sums, None]:
        return sums + _forward(precision, kernel, bias, *part)[0], None

    return jax.lax.scan(add, Sums.zero(), _cut(parts, states, targets, counted))[0]


def _forward_in_parts(
    parts: int, precision: Precision, kernel: jax.Array, bias: jax.Array, *by_step: jax.Array
) -> tuple[Sums, Any]:
    """With the gradients of `PARTS_SCALE` times the loss, while the logits of a part are there.

    Args:
      by_step: states, targets and what is counted.
    """
    words = len(bias)
    kernel, bias = _filled_up(kernel, bias, by_step[0].dtype)

    def add(total: Any, part: Any) -> tuple[Any, jax.Array]:
        sums, saved = _forward(precision, kernel, bias, *part)
        cotangents = Sums(jnp.float32(PARTS_SCALE), sums.hits, sums.count)
        d_kernel, d_bias, d_states, *_ = _backward(precision, saved, cotangents)
        return jax.tree.map(jnp.add, total, (sums, d_kernel, d_bias)), d_states

    zero = Sums.zero(), jnp.zeros(kernel.shape), jnp.zeros(bias.shape)
    (sums, d_kernel, d_bias), d_states = jax.lax.scan(add, zero, _cut(parts, *by_step))
    steps, *shape = by_step[0].shape
    return sums, (d_kernel[:, :words], d_bias[:words], d_states.reshape(-1, *shape)[:steps])


def _filled_up(kernel: jax.Array, bias: jax.Array, kind: Any) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias with words that never follow, up to a multiple of `COLUMNS`, once for all parts."""
    missing = -len(bias) % COLUMNS
    kernel = jnp.pad(kernel.astype(kind), [(0, 0), (0, missing)])
    return kernel, jnp.pad(bias, (0, missing), constant_values=IMPOSSIBLE)


def _backward_in_parts(parts: int, precision: Precision, gradients: Any, cotangents: Sums) -> tuple[Any, ...]:
    d_kernel, d_bias, d_states = gradients
    scale = cotangents.loss / PARTS_SCALE
    return d_kernel * scale, d_bias * scale, (d_states.astype(jnp.float32) * scale).astype(d_states.dtype), None, None


def _cut(parts: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays `[T, ...]` in parts of the steps, `[parts, T / parts, ...]`; zeros, not counted, fill the last one."""

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, -len(array) % parts)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(parts, -1, *array.shape[1:])

    return tuple(map(cut, arrays))


cross_entropy_in_parts.defvjp(_forward_in_parts, _backward_in_parts)
