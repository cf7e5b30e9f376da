"""The time loop of New-LLM as one GPU kernel each way: what `gpu_kernels.py` is called with, and where it can be.

Pallas, in which the kernels are written, is imported where they are used: it takes time, and newer versions of JAX may
no longer have the back end that they need.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import CellParams, CellSpec
from newllm_jax.newllm.recurrence.gradients import Activations, Gradients, bias_gradient, kernel_gradient
from newllm_jax.training.back_end import triton_obstacle
from newllm_jax.training.precision import PRECISIONS, product, storage_type

if TYPE_CHECKING:
    from newllm_jax.newllm.recurrence.gpu_group import Tiling

SMALLEST_WIDTH = 256  # cut into 16 shares of 16 columns, the smallest that the tensor cores multiply


def supports(spec: CellSpec, batch: int, steps: int) -> bool:
    """Whether this form computes the cell, for `batch` texts of `steps` tokens."""
    return not obstacle(spec, batch, steps)


def obstacle(spec: CellSpec, batch: int, steps: int) -> str:
    """Why this form does not compute a cell; "" where it does.

    It says nothing of the device: only GPUs that can run the kernels have the precisions tf32 and bf16.
    """
    if spec.precision not in ("tf32", "bf16"):
        return f"its products are in tf32 or bf16, not in {spec.precision}"
    if any(width < SMALLEST_WIDTH or width.bit_count() != 1 for width in (spec.hidden_dim, spec.context_dim)):
        return f"hidden_dim and context_dim must be powers of two from {SMALLEST_WIDTH}"
    if spec.num_layers < 2:
        return "num_layers must be 2 or more"
    if spec.num_layers * (steps + 1) * (batch + 64) * spec.hidden_dim >= 2**31:
        return "32 bits cannot number the activations; use a smaller micro_batch or sequence_length"
    return triton_obstacle()


def tiling_for(batch: int, storage: Any) -> Tiling:
    """The tiling that measured best on an H200, where 8 groups of thread blocks fill the card.

    Args:
      storage: the type in which activations are stored.
    """
    from newllm_jax.newllm.recurrence.gpu_group import Tiling

    power_of_two = 1 << (batch - 1).bit_length()
    rows = min(max(power_of_two // 8, 16), 64)
    wide = storage == jnp.float32 and rows > 16
    return Tiling(rows, blocks=16, depth=64 if wide else 128, warps=4, stages=3)


def forward(
    spec: CellSpec,
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    seeds: jax.Array | None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[tuple[jax.Array, jax.Array], Activations]:
    """The results of `reference.scan_plain`, and what the backward pass needs, its batch padded to whole groups.

    Args:
      tiling: None for `tiling_for`.
      interpret: without a GPU, for tests; with one block a group.
    """
    from newllm_jax.newllm.recurrence.gpu_kernels import forward_kernel

    (steps, batch, hidden), width = tokens.shape, context.shape[-1]
    storage = storage_type(spec.precision)
    tiling = tiling or tiling_for(batch, storage)
    context, tokens = _pad_batch(context, tiling.rows), _pad_batch(tokens, tiling.rows)
    rows = context.shape[0]
    rate = 0.0 if seeds is None else spec.dropout
    seeds = jnp.zeros((2,), jnp.uint32) if seeds is None else seeds
    texts = batch if spec.mask_texts is None else spec.mask_texts
    kernel = partial(
        forward_kernel, tiling=tiling, texts=texts, dropout=rate, precision=PRECISIONS[spec.precision], alone=interpret
    )
    shapes = [
        ((steps, rows, width), jnp.float32),  # contexts
        ((spec.num_layers - 1, steps, rows, hidden), storage),  # activations of all layers but the last
        ((steps, rows, hidden), storage),  # of the last
        ((steps, rows, 3 * width), jnp.float32),  # the gates' pre-activations
        ((rows, width), jnp.float32),  # the last context
        ((steps + 1, rows, width), jnp.float32),  # contexts before their LayerNorm
        ((steps + 1, rows, tiling.blocks), jnp.float32),  # the means of the blocks' shares of those
        ((steps + 1, rows, tiling.blocks), jnp.float32),  # and their sums of squared deviations
    ]
    contexts, states, outputs, gates, last, *_ = _call(kernel, shapes, tiling, rows, interpret)(
        tokens, seeds, context, params.context_in.T.astype(storage),
        jnp.swapaxes(_stacked_kernels(params, storage), 1, 2), jnp.stack([bias for _, bias in params.hidden]),
        params.gates[0].T.astype(storage), params.gates[1], *params.norm,
    )  # fmt: skip
    return (last[:batch], outputs[:, :batch]), Activations(contexts, states, outputs, gates)


def backward(
    spec: CellSpec,
    params: CellParams,
    stored: Activations,
    seeds: jax.Array | None,
    d_last: jax.Array,
    d_outputs: jax.Array,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Gradients:
    """The gradients of all inputs; arguments of `reference.backward`, and of `forward`."""
    from newllm_jax.newllm.recurrence.gpu_kernels import backward_kernel

    (steps, batch, _), width, storage = d_outputs.shape, d_last.shape[-1], storage_type(spec.precision)
    tiling = tiling or tiling_for(batch, storage)
    rows = stored.gates.shape[1]
    scale = 1.0 if seeds is None else 1 / (1 - spec.dropout)
    kernel = partial(
        backward_kernel, tiling=tiling, scale=scale, precision=PRECISIONS[spec.precision], alone=interpret
    )  # fmt: skip
    shapes = [
        (stored.hidden.shape, storage),  # gradients of the pre-activations of all layers but the first
        (stored.hidden.shape[1:], storage),  # of the first
        ((steps, rows, 3 * width), storage),  # of the gates'
        ((steps, rows, width), jnp.float32),  # of the contexts, but for the part through the layers
        ((steps, rows, width), jnp.float32),  # of the contexts
        ((2, rows, width), jnp.float32),  # of scale and bias of the LayerNorm, summed over the steps
    ]
    d_pre, d_first, d_gates, _, d_contexts, d_norm = _call(kernel, shapes, tiling, rows, interpret)(
        _pad_batch(d_last, tiling.rows), _pad_batch(d_outputs, tiling.rows), stored.contexts, stored.hidden,
        stored.outputs, stored.gates, params.context_in.astype(storage), _stacked_kernels(params, storage),
        params.gates[0].astype(storage), *params.norm,
    )  # fmt: skip
    kernels = product("ltbi,ltbo->lio", stored.hidden, d_pre, spec.precision)
    biases = jnp.sum(d_pre, (1, 2), dtype=jnp.float32)
    return Gradients(
        params=CellParams(
            context_in=kernel_gradient(stored.contexts, d_first, spec.precision),
            hidden=tuple((kernels[layer], biases[layer]) for layer in range(len(params.hidden))),
            gates=(kernel_gradient(stored.outputs, d_gates, spec.precision), bias_gradient(d_gates)),
            norm=(jnp.sum(d_norm[0], 0), jnp.sum(d_norm[1], 0)),
        ),
        context=d_contexts[0, :batch],
        tokens=d_first[:, :batch].astype(jnp.float32),
    )


def _stacked_kernels(params: CellParams, storage: Any) -> jax.Array:
    """`[L - 1, H, H]`, those of all layers but the first."""
    return jnp.stack([kernel.astype(storage) for kernel, _ in params.hidden])


def _pad_batch(x: jax.Array, multiple: int) -> jax.Array:
    """Fills the batch, the last axis but one, up to a multiple with zeros."""
    missing = -x.shape[-2] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing else x


def _call(kernel: Callable[..., None], shapes: list[Any], tiling: Tiling, rows: int, interpret: bool) -> Any:
    """The kernel as a function of its inputs but for the counters of its barriers, which start at 0."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    groups = rows // tiling.rows
    counters = jnp.zeros((groups + 1,), jnp.int32)  # one for each group's barriers, and one for the tickets
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
