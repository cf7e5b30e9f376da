"""The recurrence of New-LLM over a piece of text: the context vector carried through the layers, step by step.

`scan_plain` is the definition, differentiated by JAX. `scan` computes the same and has a backward pass of its own,
which leaves in the time loop only what depends on the step after it: the gradient of every weight is one large
product over all steps at the end, instead of a small one added up at every step. Its time loops come in three forms.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.recurrence import cpu as columns
from newllm_jax.newllm.recurrence import reference as rows
from newllm_jax.newllm.recurrence.cell import CellParams, Forward, step
from newllm_jax.newllm.recurrence.gradients import over_steps, total

Loops = Literal["rows", "columns", "fused"]


def loops_for(config: NewLLMConfig, precision: str) -> Loops:
    """The form of the time loops that is fastest in this resolved precision on the default device.

    `fused`, a GPU kernel each, where `fusible` says that they can be; `columns` on CPUs; else `rows`.
    """
    if fusible(config, precision):
        return "fused"
    return "columns" if jax.devices()[0].platform == "cpu" else "rows"


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
    loops: Loops = "rows",
) -> tuple[jax.Array, jax.Array]:
    """`scan_plain` with the backward pass described above.

    Args:
      loops: the form of the time loops; hidden states of `fused` are of the precision's `storage_type`.
    """
    return _forward(params, context, tokens, seeds, dropout, precision, loops)[0]


def _forward(
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    seeds: jax.Array | None,
    dropout: float,
    precision: jax.lax.PrecisionLike,
    loops: Loops,
) -> tuple[tuple[jax.Array, jax.Array], tuple[CellParams, Forward, bool]]:
    kept = _form(loops).forward(params, context, tokens, seeds, dropout, precision)
    return (kept.last, kept.outputs[:, : len(kept.last)]), (params, kept, seeds is not None)


def _backward(
    dropout: float,
    precision: jax.lax.PrecisionLike,
    loops: Loops,
    saved: tuple[CellParams, Forward, bool],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[CellParams, jax.Array, jax.Array, None]:
    """The chain through time gives the gradient of every pre-activation; products over all steps give the weights'."""
    params, kept, dropped = saved
    scale = 1 / (1 - dropout) if dropped else 1.0
    chain = _form(loops).backward(params, kept, *cotangents, scale, precision)
    gradients = CellParams(
        context_in=over_steps(kept.contexts, chain.d_first, precision),
        hidden=chain.hidden,
        gates=(over_steps(kept.outputs, chain.d_gates, precision), total(chain.d_gates)),
        norm=chain.norm,
    )
    batch = chain.d_context.shape[0]
    return gradients, chain.d_context, chain.d_first[:, :batch].astype(jnp.float32), None


scan.defvjp(_forward, _backward)


def _form(loops: Loops) -> ModuleType:
    """The module with `forward` and `backward` of this form."""
    if loops == "fused":
        from newllm_jax.newllm.recurrence import gpu as fused  # Pallas takes time to import

        return fused
    return {"rows": rows, "columns": columns}[loops]
