"""The GPU kernels, interpreted: the same numbers as the loops of the recurrence, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")

from newllm_jax.newllm.recurrence import gpu as fused
from newllm_jax.newllm.recurrence import reference as rows
from newllm_jax.newllm.recurrence.cell import CellParams
from newllm_jax.newllm.recurrence.gpu_group import Tiling

pytestmark = pytest.mark.quick

TIME, BATCH, HIDDEN, CONTEXT, LAYERS = 3, 20, 32, 16, 3
HIGHEST = jax.lax.Precision.HIGHEST
ALONE = Tiling(rows=16, blocks=1, depth=16, warps=4, stages=1)  # the interpreter runs one block after the other


@pytest.fixture(scope="module", params=[LAYERS, 2])
def inputs(request):
    draw = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(0.3 * draw.standard_normal(shape), jnp.float32)

    params = CellParams(
        context_in=array(CONTEXT, HIDDEN),
        hidden=tuple((array(HIDDEN, HIDDEN), array(HIDDEN)) for _ in range(request.param - 1)),
        gates=(array(HIDDEN, 3 * CONTEXT), array(3 * CONTEXT)),
        norm=(1 + 20 * array(CONTEXT), array(CONTEXT)),  # large, so that some of the context is clipped
    )
    return params, array(BATCH, CONTEXT), array(TIME, BATCH, HIDDEN), jnp.array([3, 4], jnp.uint32)


def close(ours: jax.Array, reference: jax.Array) -> None:
    largest = float(jnp.abs(reference).max())
    assert largest > 1e-3
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=2e-6 * largest)


def test_equals_the_loops(inputs):
    (params, context, tokens, seeds), scale = inputs, 1 / 0.75
    loop = jax.jit(lambda: rows.forward(params, context, tokens, seeds, 0.25, HIGHEST))()
    kernel = fused.forward(params, context, tokens, seeds, 0.25, HIGHEST, ALONE, interpret=True)
    assert float(jnp.abs(loop.contexts).max()) == 10
    close(kernel.last, loop.last)
    close(kernel.outputs[:, :BATCH], loop.outputs)
    for ours, reference in zip(
        [kernel.contexts, kernel.gates, *kernel.states], [loop.contexts, loop.gates, *loop.states], strict=True
    ):
        close(ours[:, :BATCH], reference)

    d_last, d_outputs = (jax.random.normal(jax.random.key(part.ndim), part.shape) for part in (loop.last, loop.outputs))
    expected = jax.jit(lambda: rows.backward(params, loop, d_last, d_outputs, scale, HIGHEST))()
    found = fused.backward(params, kernel, d_last, d_outputs, scale, HIGHEST, ALONE, interpret=True)
    close(found.d_context, expected.d_context)
    for name in ("d_first", "d_gates"):
        close(getattr(found, name)[:, :BATCH], getattr(expected, name))
        assert not np.any(getattr(found, name)[:, BATCH:])  # the rows that only fill up a group
    weights = [jax.tree.leaves((gradients.hidden, gradients.norm)) for gradients in (found, expected)]
    for ours, reference in zip(*weights, strict=True):
        close(ours, reference)


def test_bf16_without_dropout_keeps_activations_in_bf16_and_the_context_in_float32(inputs):
    params, context, tokens, _ = inputs
    bf16 = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    kernel = fused.forward(params, context, tokens, None, 0.25, bf16, ALONE, interpret=True)
    assert {kernel.states.dtype, kernel.outputs.dtype} == {jnp.dtype("bfloat16")}
    assert {kernel.contexts.dtype, kernel.gates.dtype, kernel.last.dtype} == {jnp.dtype("float32")}
    strict = jax.jit(lambda: rows.forward(params, context, tokens, None, 0.25, HIGHEST))()
    error = float(jnp.linalg.norm(kernel.outputs[:, :BATCH] - strict.outputs) / jnp.linalg.norm(strict.outputs))
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("batch, rows", [(1, 16), (32, 16), (256, 32), (300, 64), (4096, 64)])
def test_groups_fill_the_card_but_have_rows_enough(batch, rows):
    assert fused.tiling_for(batch, jnp.bfloat16).rows == rows
