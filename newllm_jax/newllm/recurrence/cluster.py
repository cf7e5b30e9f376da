"""The time loop of New-LLM as one GPU kernel each way, in clusters of thread blocks: which cells, and what with.

Pallas, in which the kernels are written, is imported where they are used, as in `gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec
from newllm_jax.newllm.recurrence.cluster_tiling import COLUMNS, ROWS, WIDTHS, shared_bytes, tiles_of_chunk
from newllm_jax.newllm.recurrence.gradients import Gradients, gradients_over_steps
from newllm_jax.newllm.recurrence.launch import launch_members, mask_seeds, numbering_obstacle, pad_batch, scale_of
from newllm_jax.training.back_end import compute_capability, mosaic_obstacle, shared_memory

if TYPE_CHECKING:
    from newllm_jax.newllm.recurrence.cluster_forward_kernel import Results


def supports(spec: CellSpec, batch: int, steps: int) -> bool:
    """Whether this form computes the cell on the default device, for `batch` texts of `steps` tokens."""
    return not obstacle(spec, batch, steps)


def obstacle(spec: CellSpec, batch: int, steps: int) -> str:
    """Why this form does not compute a cell; "" where it does."""
    if spec.precision != "bf16":
        return f"its products are in bf16, not in {spec.precision}"
    if spec.cell != "plain":
        return f"it has no {spec.cell} cell"
    if spec.hidden_dim != spec.context_dim or spec.hidden_dim not in WIDTHS:
        return f"hidden_dim and context_dim must be the same, {' or '.join(map(str, WIDTHS))}"
    if spec.num_layers < 2:
        return "num_layers must be 2 or more"
    if reason := numbering_obstacle(spec, batch, steps):
        return reason
    if compute_capability() != "9.0":
        return "clusters of thread blocks need a GPU of compute capability 9.0"
    needed = shared_bytes(spec.hidden_dim, spec.num_layers)
    if needed > shared_memory():
        return f"so many layers need {needed} bytes of shared memory, and this GPU has {shared_memory()}"
    return mosaic_obstacle()


def forward(
    spec: CellSpec,
    params: CellParams,
    context: jax.Array,
    tokens: jax.Array,
    dropout: CellDropout,
    interpret: Any = None,
) -> tuple[tuple[jax.Array, jax.Array], Results]:
    """The results of `reference.scan_plain`, and what the backward pass needs, its batch padded to whole clusters.

    Args:
      interpret: Pallas's `InterpretGPUParams`, for tests without a GPU; then a width of 64, for clusters of one block.
    """
    from newllm_jax.newllm.recurrence.cluster_forward_kernel import Inputs, Results, forward_kernel

    (steps, batch, hidden), layers = tokens.shape, spec.num_layers
    context, tokens = pad_batch(context, ROWS), pad_batch(tokens, ROWS)
    rows, texts = len(context), batch if spec.mask_texts is None else spec.mask_texts
    kinds = bool(dropout.step), bool(dropout.text)
    kernels = [params.context_in, *(kernel for kernel, _ in params.hidden), *jnp.split(params.gates[0], 3, 1)]
    vectors = [*(bias for _, bias in params.hidden), *jnp.split(params.gates[1], 3), *params.norm]
    inputs = Inputs(
        tokens, mask_seeds(dropout), scale_of(dropout), context, _chunks(kernels), _by_blocks(vectors),
    )  # fmt: skip
    shapes = Results(
        contexts=((steps, rows, hidden), jnp.float32),
        states=((layers - 1, steps, rows, hidden), jnp.bfloat16),
        outputs=((steps, rows, hidden), jnp.bfloat16),
        gates=((steps, rows, 3 * hidden), jnp.float32),
        moments=((steps, 2, rows), jnp.float32),
        last=((rows, hidden), jnp.float32),
    )
    results = _call(forward_kernel, inputs, shapes, 2 if any(kinds) else 1, interpret, texts=texts, kinds=kinds)
    return (results.last[:batch], results.outputs[:, :batch]), results._replace(last=None)


def backward(
    spec: CellSpec,
    params: CellParams,
    stored: Results,
    dropout: CellDropout,
    d_last: jax.Array,
    d_outputs: jax.Array,
    interpret: Any = None,
) -> Gradients:
    """The gradients of all inputs; arguments of `reference.backward`, and of `forward`."""
    from newllm_jax.newllm.recurrence.cluster_backward_kernel import Inputs, Results, backward_kernel

    steps, batch, hidden = d_outputs.shape
    rows = stored.outputs.shape[1]
    read = [*jnp.split(params.gates[0], 3, 1), *(kernel for kernel, _ in params.hidden[::-1]), params.context_in]
    inputs = Inputs(
        pad_batch(d_last, ROWS), pad_batch(d_outputs, ROWS), scale_of(dropout), stored.contexts, stored.states,
        stored.outputs, stored.gates, stored.moments, _chunks([kernel.T for kernel in read]), _by_blocks(params.norm),
    )  # fmt: skip
    shapes = Results(
        d_pre=(stored.states.shape, jnp.bfloat16),
        d_first=(stored.outputs.shape, jnp.bfloat16),
        d_gates=((steps, rows, 3 * hidden), jnp.bfloat16),
        d_context=((rows, hidden), jnp.float32),
        d_norm=((2, rows, hidden), jnp.float32),
    )
    found = _call(backward_kernel, inputs, shapes, 1, interpret)
    return gradients_over_steps(stored, found, stored.states, found.d_context[:batch], spec.precision)


def _chunks(kernels: Sequence[jax.Array]) -> jax.Array:
    """Kernels `[in, out]`, all of the same width, as the blocks read them, in this order: bf16 `[N, S, D, 64, 64]`."""
    stacked = jnp.stack([kernel.astype(jnp.bfloat16) for kernel in kernels])
    blocks = stacked.shape[-1] // COLUMNS
    depth = tiles_of_chunk(blocks)
    parts = stacked.reshape(len(kernels), blocks // depth, depth, COLUMNS, blocks, COLUMNS)
    return parts.transpose(4, 0, 1, 2, 5, 3).reshape(blocks, -1, depth, COLUMNS, COLUMNS)


def _by_blocks(vectors: Sequence[jax.Array]) -> jax.Array:
    """Each block's columns of V vectors: `[N, V, 64]`."""
    return jnp.stack([vector.reshape(-1, COLUMNS) for vector in vectors], 1)


def _call(
    kernel: Callable[..., None], inputs: Any, shapes: Any, programs: int, interpret: Any, **settings: Any
) -> Any:  # fmt: skip
    """Launches a kernel, a block for each share of 64 columns, and a cluster for each 64 rows of each member.

    Args:
      kernel: called with references to inputs and results, which have an axis of members before the others, to the
        memory between blocks, and to that of a block.
      inputs: a named tuple of arrays, `vectors` among them.
      shapes: a named tuple of the shapes and types of the results.
      programs: groups of four warps in a block, which run the kernel as their number, `warps`, says.
      settings: what else the kernel is called with.

    Returns:
      The results by the names of `shapes`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from newllm_jax.newllm.recurrence.cluster_group import Between, Shared, shared_for

    (blocks, vectors, _), rows = inputs.vectors.shape, inputs[0].shape[-2]
    counts = len(inputs), len(inputs) + len(shapes), len(inputs) + len(shapes) + len(Between._fields)

    def on_references(*references: Any) -> None:
        read, written, between = (references[start:end] for start, end in zip((0, *counts), counts, strict=False))
        kernel(
            type(inputs)(*read),
            type(shapes)(*written),
            Between(*between),
            Shared(*references[counts[-1] :]),
            **settings,
        )

    def launch(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        members = len(arrays[0])
        clusters = members * rows // ROWS
        results = [jax.ShapeDtypeStruct((members, *shape), kind) for shape, kind in shapes]
        return plgpu.kernel(
            on_references,
            out_type=[*results, *Between.for_clusters(clusters, blocks)],
            grid=(clusters,), grid_names=("cluster",), cluster=(blocks,), cluster_names=("rank",),
            num_threads=programs, thread_name="warps",
            scratch_types=list(shared_for(blocks, vectors)),
            compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
            interpret=interpret, kernel_name=kernel.__name__,
        )(*arrays)[: len(shapes)]  # fmt: skip

    return type(shapes)(*launch_members(launch, inputs))
