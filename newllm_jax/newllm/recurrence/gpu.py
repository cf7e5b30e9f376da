"""The time loop of New-LLM as one GPU kernel each way: what the kernels are called with, and where they can be.

Pallas, in which the kernels are written, is imported where they are used: it takes time, and newer versions of JAX may
no longer have the back end that they need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec, rms_norm
from newllm_jax.newllm.recurrence.gpu_tiling import MOST_BLOCKS, SMALLEST_GROUP, Tiling, shared_bytes, tiling_for
from newllm_jax.newllm.recurrence.gradients import Gradients, gradients_over_steps
from newllm_jax.newllm.recurrence.launch import launch_members, mask_seeds, numbering_obstacle, pad_batch, scale_of
from newllm_jax.training.back_end import multiprocessors, shared_memory, triton_obstacle
from newllm_jax.training.precision import PRECISIONS, storage_type

if TYPE_CHECKING:
    from newllm_jax.newllm.recurrence.gpu_forward_kernel import Results

SMALLEST_WIDTH = 256  # cut into 16 shares of 16 columns, which all versions of JAX can multiply


def supports(spec: CellSpec, batch: int, steps: int) -> bool:
    """Whether this form computes the cell, for `batch` texts of `steps` tokens."""
    return not obstacle(spec, batch, steps)


def obstacle(spec: CellSpec, batch: int, steps: int) -> str:
    """Why this form does not compute a cell; "" where it does.

    Of the device it says no more than whether it is too small: only GPUs that can run the kernels have the precisions
    tf32 and bf16.
    """
    if spec.precision not in ("tf32", "bf16"):
        return f"its products are in tf32 or bf16, not in {spec.precision}"
    if any(width < SMALLEST_WIDTH or width.bit_count() != 1 for width in (spec.hidden_dim, spec.context_dim)):
        return f"hidden_dim and context_dim must be powers of two from {SMALLEST_WIDTH}"
    if spec.num_layers < 2:
        return "num_layers must be 2 or more"
    if reason := numbering_obstacle(spec, batch, steps):
        return reason
    if 0 < multiprocessors() < SMALLEST_GROUP:
        return f"{SMALLEST_GROUP} thread blocks that wait for each other need as many multiprocessors"
    storage, widths = storage_type(spec.precision), (spec.hidden_dim, spec.context_dim)
    needed = shared_bytes(tiling_for(batch, storage, widths), storage, widths)
    if needed > shared_memory():
        return f"layers as wide need {needed} bytes of shared memory, and this GPU has {shared_memory()}"
    return triton_obstacle()


def forward(
    spec: CellSpec,
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    dropout: CellDropout,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[tuple[jax.Array, jax.Array], Results]:
    """The results of `reference.scan_plain`, and what the backward pass needs, its batch padded to whole groups.

    Args:
      tiling: None for `tiling_for`.
      interpret: without a GPU, for tests; with one block a group.
    """
    from newllm_jax.newllm.recurrence.gpu_forward_kernel import Inputs, Results, forward_kernel

    (steps, batch, hidden), width = tokens.shape, context.shape[-1]
    storage, layers, residual = storage_type(spec.precision), spec.num_layers, spec.cell == "residual"
    given, tiling = tiling, tiling or tiling_for(batch, storage, (hidden, width))
    context, tokens = pad_batch(context, tiling.rows), pad_batch(tokens, tiling.rows)
    rows, texts = context.shape[0], batch if spec.mask_texts is None else spec.mask_texts
    inputs = Inputs(
        tokens, mask_seeds(dropout), scale_of(dropout), context,
        params.context_in.T.astype(storage), jnp.swapaxes(_stacked_kernels(params, storage), 1, 2),
        jnp.stack([bias for _, bias in params.hidden]), params.gates[0].T.astype(storage), params.gates[1],
        *params.norm,
    )  # fmt: skip
    shapes = Results(
        contexts=((steps, rows, width), jnp.float32),
        states=((layers - 1, steps, rows, hidden), storage),
        outputs=((steps, rows, hidden), storage),
        gates=((steps, rows, 3 * width), jnp.float32),
        last=((rows, width), jnp.float32),
        mixed=((steps + 1, rows, width), jnp.float32),
        means=((steps + 1, rows, MOST_BLOCKS), jnp.float32),
        squares=((steps + 1, rows, MOST_BLOCKS), jnp.float32),
        activations=((layers, steps, rows, hidden), storage) if residual else None,
        state_squares=((layers - 1, steps, rows, MOST_BLOCKS), jnp.float32) if residual else None,
    )
    kernel = partial(
        forward_kernel, texts=texts, kinds=(bool(dropout.step), bool(dropout.text)),
        precision=PRECISIONS[spec.precision], alone=interpret,
    )  # fmt: skip
    results = _call(kernel, inputs, shapes, _tilings(given, rows, storage, (hidden, width)), interpret)
    return (results.last[:batch], results.outputs[:, :batch]), results._replace(mixed=None, means=None, squares=None)


def backward(
    spec: CellSpec,
    params: CellParams,
    stored: Results,
    dropout: CellDropout,
    d_last: jax.Array,
    d_outputs: jax.Array,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Gradients:
    """The gradients of all inputs; arguments of `reference.backward`, and of `forward`."""
    from newllm_jax.newllm.recurrence.gpu_backward_kernel import Inputs, Results, backward_kernel

    (steps, batch, _), width, storage = d_outputs.shape, d_last.shape[-1], storage_type(spec.precision)
    residual, widths = spec.cell == "residual", (d_outputs.shape[-1], width)
    given, tiling = tiling, tiling or tiling_for(batch, storage, widths)
    rows = stored.gates.shape[1]
    inputs = Inputs(
        pad_batch(d_last, tiling.rows), pad_batch(d_outputs, tiling.rows), scale_of(dropout), stored.contexts,
        stored.states, stored.outputs, stored.gates, params.context_in.astype(storage),
        _stacked_kernels(params, storage), params.gates[0].astype(storage), *params.norm, stored.activations,
        stored.state_squares, jnp.stack([bias for _, bias in params.hidden]) if residual else None,
    )  # fmt: skip
    shapes = Results(
        d_pre=(stored.states.shape, storage),
        d_first=(stored.outputs.shape, storage),
        d_gates=((steps, rows, 3 * width), storage),
        d_direct=((steps, rows, width), jnp.float32),
        d_contexts=((steps, rows, width), jnp.float32),
        d_norm=((2, rows, width), jnp.float32),
        along=((*stored.states.shape[:3], MOST_BLOCKS), jnp.float32) if residual else None,
    )
    kernel = partial(backward_kernel, precision=PRECISIONS[spec.precision], alone=interpret)
    found = _call(kernel, inputs, shapes, _tilings(given, rows, storage, widths), interpret)
    read = rms_norm(stored.states.astype(jnp.float32)).astype(storage) if residual else stored.states
    return gradients_over_steps(stored, found, read, found.d_contexts[0, :batch], spec.precision)


def _tilings(given: Tiling | None, batch: int, storage: Any, widths: tuple[int, int]) -> Callable[[int], Tiling]:
    """The tiling by number of members: the given one, or that for the padded batch."""
    return lambda members: given or tiling_for(batch, storage, widths, members)


def _stacked_kernels(params: CellParams, storage: Any) -> jax.Array:
    """`[L - 1, H, H]`, those of all layers but the first."""
    return jnp.stack([kernel.astype(storage) for kernel, _ in params.hidden])


def _call(kernel: partial[None], inputs: Any, shapes: Any, tiling_of: Callable[[int], Tiling], interpret: bool) -> Any:
    """Launches a kernel, also for all members of a `jax.vmap` at once.

    Args:
      kernel: called with the references to inputs and results as here, which have an axis of members before the others,
        with those to the counters of its barriers, which start at 0, and the tiling.
      inputs: a named tuple of arrays, or None; the first one has the padded batch.
      shapes: a named tuple of the shapes and types of the results, or None.
      tiling_of: (number of members) -> the tiling of a launch.

    Returns:
      The results by the names of `shapes`.
    """

    def launch(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        return _launch(kernel, inputs, shapes, arrays, tiling_of(len(arrays[0])), interpret)

    return _fill(shapes, launch_members(launch, [x for x in inputs if x is not None]))


def _launch(
    kernel: partial[None],
    inputs: Any,
    shapes: Any,
    arrays: Sequence[jax.Array],
    tiling: Tiling,
    interpret: bool,
) -> list[jax.Array]:
    """The results of all members, `[M, ...]` each.

    Args:
      kernel, inputs, shapes: as in `_call`, where those of one member tell which there are.
      arrays: the inputs of all members, `[M, ...]` each.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    members, batch = len(arrays[0]), arrays[0].shape[-2]
    groups = members * batch // tiling.rows
    counters = jnp.zeros((groups + 1,), jnp.int32)  # one for each group's barriers, and one for the tickets
    results = [jax.ShapeDtypeStruct((members, *each[0]), each[1]) for each in shapes if each]
    results.append(jax.ShapeDtypeStruct(counters.shape, counters.dtype))
    counted = len(arrays)

    def on_references(*references: Any) -> None:
        found = _fill(inputs, references[:counted]), _fill(shapes, references[counted + 1 : -1])
        kernel(*found, references[-1], tiling=tiling)

    found = pl.pallas_call(
        on_references,
        out_shape=results,
        grid=(groups * tiling.blocks,),
        input_output_aliases={counted: len(results) - 1},
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name=kernel.func.__name__,
    )(*arrays, counters)
    return list(found[:-1])


def _fill(names: Any, values: Sequence[Any]) -> Any:
    """A named tuple with these values in the places of what is not None."""
    left = iter(values)
    return type(names)(*(None if each is None else next(left) for each in names))
