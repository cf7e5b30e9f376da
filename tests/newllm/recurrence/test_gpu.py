"""The GPU kernels, interpreted: the same numbers as the plain form of the time loop, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")

from newllm_jax.config import Precision
from newllm_jax.newllm.recurrence import gpu, reference
from newllm_jax.newllm.recurrence.cell import CellParams, CellSpec
from newllm_jax.newllm.recurrence.gpu_group import Tiling

pytestmark = pytest.mark.quick

TIME, BATCH, HIDDEN, CONTEXT, LAYERS = 3, 20, 32, 16, 3
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
    # Sums over texts and steps of numbers of both signs: rounding is relative to the largest.
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5 * largest)


def spec_of(params: CellParams, precision: Precision = "fp32") -> CellSpec:
    return CellSpec(HIDDEN, CONTEXT, len(params.hidden) + 1, 0.25, precision)


def test_equals_the_plain_form(inputs):
    params, context, tokens, seeds = inputs
    spec, alone = spec_of(params), {"tiling": ALONE, "interpret": True}
    results, residuals = jax.jit(lambda: reference.forward(spec, params, context, tokens, seeds))()
    found, stored = gpu.forward(spec, params, context, tokens, seeds, **alone)
    assert float(jnp.abs(residuals.contexts).max()) == 10
    for ours, expected in zip(found, results, strict=True):
        close(ours, expected)
    close(stored.contexts[:, :BATCH], residuals.contexts)
    close(stored.gates[:, :BATCH], residuals.layers[-1])

    d_results = [jax.random.normal(jax.random.key(part.ndim), part.shape) for part in results]
    expected = jax.jit(lambda: reference.backward(spec, params, residuals, seeds, *d_results))()
    gradients = gpu.backward(spec, params, stored, seeds, *d_results, **alone)
    for ours, plain in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        close(ours, plain)


def test_a_part_of_a_batch_sees_its_rows_of_the_masks(inputs):
    params, context, tokens, seeds = inputs
    spec, first = spec_of(params), 4
    (_, outputs), _ = jax.jit(lambda: reference.forward(spec, params, context, tokens, seeds))()
    here = seeds.at[0].add(first * HIDDEN)
    for texts, same in ((BATCH, True), (None, False)):
        (_, found), _ = gpu.forward(
            replace(spec, mask_texts=texts), params, context[first:], tokens[:, first:], here,
            tiling=ALONE, interpret=True,
        )  # fmt: skip
        assert np.allclose(found, outputs[:, first:], atol=1e-4) == same


def test_bf16_without_dropout_stores_activations_in_bf16_and_the_context_in_float32(inputs):
    params, context, tokens, _ = inputs
    (last, outputs), stored = gpu.forward(
        spec_of(params, "bf16"), params, context, tokens, None, tiling=ALONE, interpret=True
    )  # fmt: skip
    assert {stored.hidden.dtype, outputs.dtype} == {jnp.dtype("bfloat16")}
    assert {stored.contexts.dtype, stored.gates.dtype, last.dtype} == {jnp.dtype("float32")}
    (_, strict), _ = jax.jit(lambda: reference.forward(spec_of(params), params, context, tokens, None))()
    error = float(jnp.linalg.norm(outputs - strict) / jnp.linalg.norm(strict))
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("batch, rows", [(1, 16), (32, 16), (256, 32), (300, 64), (4096, 64)])
def test_groups_fill_the_card_but_have_rows_enough(batch, rows):
    assert gpu.tiling_for(batch, jnp.bfloat16).rows == rows
