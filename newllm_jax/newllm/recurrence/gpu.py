"""The time loop of New-LLM as a GPU kernel each way, those of `kernel.py`.

`recurrence.fusible` says where they can be used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from newllm_jax.newllm.recurrence.cell import Backward, CellParams, Forward
from newllm_jax.newllm.recurrence.gpu_group import Tiling
from newllm_jax.newllm.recurrence.gpu_kernels import backward_kernel, forward_kernel
from newllm_jax.training.precision import product, storage_type


def tiling_for(batch: int, low: Any) -> Tiling:
    """The tiling that measured best on an H200, where 8 groups fill the card."""
    rows = min(max(pl.next_power_of_2(batch) // 8, 16), 64)
    wide = low == jnp.float32 and rows > 16
    return Tiling(rows, blocks=16, depth=64 if wide else 128, warps=4, stages=3)


def _stacked(params: CellParams, low: Any) -> jax.Array:
    return jnp.stack([kernel.astype(low) for kernel, _ in params.hidden])


def pad_rows(x: jax.Array, multiple: int) -> jax.Array:
    """Fills the batch, the last axis but one, up to a multiple."""
    missing = -x.shape[-2] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing else x


def forward(
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    seeds: jax.Array | None,
    dropout: float,
    precision: jax.lax.PrecisionLike,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Forward:
    """All steps forward; arguments as of `recurrence.scan_plain`.

    Args:
      tiling: None for the one that measured best.
      interpret: without a GPU, for tests; one block a group.
    """
    steps, batch, hidden = tokens.shape
    width, layers, low = context.shape[-1], len(params.hidden) + 1, storage_type(precision)
    tiling = tiling or tiling_for(batch, low)
    context, tokens = pad_rows(context, tiling.rows), pad_rows(tokens, tiling.rows)
    rows = context.shape[0]
    rate = 0.0 if seeds is None else dropout
    seeds = jnp.zeros((2,), jnp.uint32) if seeds is None else seeds
    kernel = partial(forward_kernel, tiling=tiling, batch=batch, dropout=rate, precision=precision, alone=interpret)
    shapes = [
        ((steps, rows, width), jnp.float32),
        ((layers - 1, steps, rows, hidden), low),
        ((steps, rows, hidden), low),
        ((steps, rows, 3 * width), jnp.float32),
        ((rows, width), jnp.float32),
        ((steps + 1, rows, width), jnp.float32),
        ((steps + 1, rows, tiling.blocks), jnp.float32),
        ((steps + 1, rows, tiling.blocks), jnp.float32),
    ]
    contexts, states, outputs, gates, last, *_ = _call(kernel, shapes, tiling, rows, interpret)(
        tokens, seeds, context, params.context_in.T.astype(low), jnp.swapaxes(_stacked(params, low), 1, 2),
        jnp.stack([b for _, b in params.hidden]), params.gates[0].T.astype(low), params.gates[1], *params.norm,
    )  # fmt: skip
    return Forward(contexts, states, gates, last[:batch], outputs)


def backward(
    params: CellParams,
    kept: Forward,
    d_last: jax.Array,
    d_outputs: jax.Array,
    scale: float,
    precision: jax.lax.PrecisionLike,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Backward:
    """All steps backward, from the gradients of what `forward` returned."""
    (steps, batch, _), width, low = d_outputs.shape, d_last.shape[-1], storage_type(precision)
    tiling = tiling or tiling_for(batch, low)
    rows = kept.gates.shape[1]
    kernel = partial(backward_kernel, tiling=tiling, scale=scale, precision=precision, alone=interpret)
    shapes = [
        (kept.states.shape, low),
        (kept.states.shape[1:], low),
        ((steps, rows, 3 * width), low),
        ((steps, rows, width), jnp.float32),
        ((steps, rows, width), jnp.float32),
        ((2, rows, width), jnp.float32),
    ]
    d_pre, d_first, d_gates, _, d_contexts, d_norm = _call(kernel, shapes, tiling, rows, interpret)(
        pad_rows(d_last, tiling.rows), pad_rows(d_outputs, tiling.rows), kept.contexts, kept.states, kept.outputs,
        kept.gates, params.context_in.astype(low), _stacked(params, low), params.gates[0].astype(low), *params.norm,
    )  # fmt: skip
    kernels = product("ltbi,ltbo->lio", kept.states, d_pre, precision)
    biases = jnp.sum(d_pre, (1, 2), dtype=jnp.float32)
    return Backward(
        d_context=d_contexts[0, :batch],
        d_first=d_first,
        d_gates=d_gates,
        hidden=tuple((kernels[layer], biases[layer]) for layer in range(len(params.hidden))),
        norm=(jnp.sum(d_norm[0], 0), jnp.sum(d_norm[1], 0)),
    )


def _call(kernel: Callable[..., None], shapes: list[Any], tiling: Tiling, rows: int, interpret: bool) -> Any:
    """The kernel as a function of its inputs but for the counters, which begin at 0."""
    groups = rows // tiling.rows
    counters = jnp.zeros((groups + 1,), jnp.int32)  # a meeting's for each group, and the tickets
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in [*shapes, (counters.shape, counters.dtype)]]

    def call(*inputs: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(
            kernel,
            out_shape=results,
            grid=(groups * tiling.blocks,),
            input_output_aliases={len(inputs): len(shapes)},
            compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
            interpret=interpret,
        )(*inputs, counters)[:-1]

    return call
