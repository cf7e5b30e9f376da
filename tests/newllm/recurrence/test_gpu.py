"""The GPU kernels, interpreted: the same numbers as the plain form of the time loop, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")

from newllm_jax.config import Cell, Precision
from newllm_jax.newllm.dropout import Dropout, Rate
from newllm_jax.newllm.recurrence import gpu, reference
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec
from newllm_jax.newllm.recurrence.gpu_tiling import Tiling

pytestmark = pytest.mark.quick

TIME, BATCH, HIDDEN, CONTEXT, LAYERS = 3, 20, 32, 16, 3
DROPOUT = CellDropout(
    *(Dropout(jnp.array(seeds, jnp.uint32), Rate.from_share(rate)) for seeds, rate in (((3, 4), 0.25), ((5, 6), 0.2)))
)
NONE = CellDropout()
ALONE = Tiling(rows=16, blocks=1, depth=16, warps=4, stages=1)  # the interpreter runs one block after the other


CELLS = ["plain", "residual"]


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
    return params, array(BATCH, CONTEXT), array(TIME, BATCH, HIDDEN), DROPOUT


def close(ours: jax.Array, reference: jax.Array) -> None:
    largest = float(jnp.abs(reference).max())
    assert largest > 1e-3
    # Sums over texts and steps of numbers of both signs: rounding is relative to the largest, and
    # the suite compiles without optimising, which rounds oftener.
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=2e-5 * largest)


def spec_of(params: CellParams, precision: Precision = "fp32", cell: Cell = "plain") -> CellSpec:
    return CellSpec(HIDDEN, CONTEXT, len(params.hidden) + 1, cell, precision)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kinds", [(), ("step",), ("text",), ("step", "text")], ids="-".join)
def test_equals_the_plain_form(inputs, cell, kinds):
    params, context, tokens, dropout = inputs
    dropout = dropout._replace(**{name: None for name in dropout._fields if name not in kinds})
    spec, alone = spec_of(params, cell=cell), {"tiling": ALONE, "interpret": True}
    results, residuals = jax.jit(lambda: reference.forward(spec, params, context, tokens, dropout))()
    found, stored = gpu.forward(spec, params, context, tokens, dropout, **alone)
    assert float(jnp.abs(residuals.contexts).max()) == 10
    for ours, expected in zip(found, results, strict=True):
        close(ours, expected)
    close(stored.contexts[:, :BATCH], residuals.contexts)
    close(stored.gates[:, :BATCH], residuals.layers[-1])

    d_results = [jax.random.normal(jax.random.key(part.ndim), part.shape) for part in results]
    expected = jax.jit(lambda: reference.backward(spec, params, residuals, dropout, *d_results))()
    gradients = gpu.backward(spec, params, stored, dropout, *d_results, **alone)
    for ours, plain in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        close(ours, plain)


def test_a_part_of_a_batch_sees_its_rows_of_the_masks(inputs):
    params, context, tokens, dropout = inputs
    spec, first = spec_of(params), 4
    (_, outputs), _ = jax.jit(lambda: reference.forward(spec, params, context, tokens, dropout))()
    here = CellDropout(*(each._replace(seeds=each.seeds.at[0].add(first * HIDDEN)) for each in dropout))
    for texts, same in ((BATCH, True), (None, False)):
        (_, found), _ = gpu.forward(
            replace(spec, mask_texts=texts), params, context[first:], tokens[:, first:], here,
            tiling=ALONE, interpret=True,
        )  # fmt: skip
        assert np.allclose(found, outputs[:, first:], atol=1e-4) == same


@pytest.mark.parametrize("cell", CELLS)
def test_bf16_without_dropout_stores_activations_in_bf16_and_the_context_in_float32(inputs, cell):
    params, context, tokens, _ = inputs
    (last, outputs), stored = gpu.forward(
        spec_of(params, "bf16", cell), params, context, tokens, NONE, tiling=ALONE, interpret=True
    )  # fmt: skip
    assert {stored.states.dtype, outputs.dtype} == {jnp.dtype("bfloat16")}
    assert {stored.contexts.dtype, stored.gates.dtype, last.dtype} == {jnp.dtype("float32")}
    (_, strict), _ = jax.jit(lambda: reference.forward(spec_of(params, cell=cell), params, context, tokens, NONE))()
    error = float(jnp.linalg.norm(outputs - strict) / jnp.linalg.norm(strict))
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("cell", CELLS)
def test_members_of_a_vmap_are_one_launch_with_the_numbers_of_each_alone(inputs, cell, monkeypatch):
    """Each has weights, texts and masks of its own; two groups of rows each."""
    params, context, tokens, dropout = inputs
    spec, alone = spec_of(params, cell=cell), {"tiling": ALONE, "interpret": True}
    members = [
        (jax.tree.map(lambda leaf, by=by: leaf * by, params), context * by, tokens + by,
         CellDropout(*(each._replace(seeds=each.seeds + number) for each in dropout)))
        for number, by in enumerate((1.0, 0.5, 2.0))
    ]  # fmt: skip

    @jax.jit
    def both_ways(params, context, tokens, dropout):
        results, stored = gpu.forward(spec, params, context, tokens, dropout, **alone)
        return results, gpu.backward(spec, params, stored, dropout, *results, **alone)

    launches = []
    launch = gpu._launch
    monkeypatch.setattr(gpu, "_launch", lambda *given: launches.append(len(given[3][0])) or launch(*given))
    found = jax.vmap(both_ways)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    assert [count for count in launches if count > 1] == [3, 3]
    for number, member in enumerate(members):
        for ours, single in zip(jax.tree.leaves(found), jax.tree.leaves(both_ways(*member)), strict=True):
            close(ours[number], single)


def test_what_members_share_is_not_of_the_last_one_only(inputs):
    params, context, tokens, dropout = inputs
    spec = spec_of(params)

    def outputs(tokens):
        return gpu.forward(spec, params, context, tokens, dropout, tiling=ALONE, interpret=True)[0][1]

    found = jax.vmap(outputs)(jnp.stack([tokens, tokens + 1]))
    close(found[0], outputs(tokens))
    close(found[1], outputs(tokens + 1))


def test_both_passes_ask_for_one_tiling(monkeypatch):
    (hidden, width), asked, tiling_for = (512, 256), [], gpu.tiling_for
    monkeypatch.setattr(gpu, "tiling_for", lambda *sizes: asked.append(sizes[:3]) or tiling_for(*sizes))
    spec = CellSpec(hidden, width, 2, "plain", "bf16", "gpu")
    params = CellParams(
        jnp.zeros((width, hidden)), ((jnp.zeros((hidden, hidden)), jnp.zeros(hidden)),),
        (jnp.zeros((hidden, 3 * width)), jnp.zeros(3 * width)), (jnp.ones(width), jnp.zeros(width)),
    )  # fmt: skip

    def both(context, tokens):
        results, stored = gpu.forward(spec, params, context, tokens, CellDropout())
        return gpu.backward(spec, params, stored, CellDropout(), *results)

    jax.eval_shape(both, jnp.zeros((4, width)), jnp.zeros((2, 4, hidden)))
    storage = jnp.dtype(jnp.bfloat16)
    assert [(batch, jnp.dtype(kind), widths) for batch, kind, widths in asked] == [
        (4, storage, (512, 256)), (16, storage, (512, 256)),
    ] * 2  # fmt: skip


def test_a_card_on_which_a_group_cannot_run_is_an_obstacle(monkeypatch):
    spec = CellSpec(512, 256, 2, "plain", "bf16", "gpu")
    for count, found in ((14, "need as many multiprocessors"), (16, ""), (0, "")):  # 0: unknown
        monkeypatch.setattr(gpu, "multiprocessors", lambda count=count: count)
        assert (found in gpu.obstacle(spec, 64, 63)) if found else gpu.obstacle(spec, 64, 63) == ""


def test_layers_too_wide_for_the_memory_of_a_multiprocessor_are_an_obstacle(monkeypatch):
    device = SimpleNamespace(platform="gpu", compute_capability="8.9", core_count=58)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert gpu.obstacle(CellSpec(512, 4096, 2, "plain", "bf16", "gpu"), 32, 63) == ""
    found = gpu.obstacle(CellSpec(512, 16384, 2, "plain", "bf16", "gpu"), 32, 63)
    assert found == "layers as wide need 197632 bytes of shared memory, and this GPU has 101376"
    device.compute_capability = "9.0"
    assert gpu.obstacle(CellSpec(512, 16384, 2, "plain", "bf16", "gpu"), 32, 63) == ""
