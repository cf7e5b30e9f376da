"""The time loop in clusters of thread blocks, computed without a GPU by Pallas's interpreter, beside the plain loop.

A cluster has one block here, so its exchanges bring back what it sent; `tests/gpu/test_time_loop.py` has larger ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.newllm.dropout import Dropout, Rate
from newllm_jax.newllm.recurrence import cluster, cluster_tiling, gpu, reference
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec
from newllm_jax.newllm.recurrence.scan import forms_for, kernel_obstacle
from newllm_jax.training import back_end
from tests.newllm.recurrence.lowering import gradient_of_a_loss

pytestmark = pytest.mark.quick

WIDTH, TIME = 64, 3
SPEC = CellSpec(WIDTH, WIDTH, 3, "plain", "bf16", "cluster")
ADVANCED = CellSpec(512, 512, 12, "plain", "bf16")


def interpreter():
    """What makes a kernel be interpreted."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()


def inputs(batch, layers=3):
    """Parameters, context, tokens and the gradients of both results."""
    draw = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * draw.standard_normal(shape), jnp.float32)

    params = CellParams(
        context_in=normal(WIDTH, WIDTH, scale=0.12),
        hidden=tuple((normal(WIDTH, WIDTH, scale=0.18), normal(WIDTH, scale=0.3)) for _ in range(layers - 1)),
        gates=(normal(WIDTH, 3 * WIDTH, scale=0.12), normal(3 * WIDTH, scale=0.3)),
        norm=(4 + normal(WIDTH, scale=0.2), normal(WIDTH, scale=0.2)),  # wide enough that some contexts are clipped
    )
    return params, normal(batch, WIDTH), normal(TIME, batch, WIDTH), normal(batch, WIDTH), normal(TIME, batch, WIDTH)


def dropout_of(*kinds):
    rates = {"step": 0.1, "text": 0.2}
    return CellDropout(**{kind: Dropout.from_key(jax.random.key(3), Rate.from_share(rates[kind])) for kind in kinds})


def error(ours, others):
    """The largest relative difference of the arrays of two structures."""

    def of(one, other):
        one, other = (np.asarray(each, np.float32) for each in (one, other))
        return float(np.linalg.norm(one - other) / np.linalg.norm(other))

    return max(jax.tree.leaves(jax.tree.map(of, ours, others)))


def check_results_and_gradients(batch, layers, *kinds):
    """Both round the same numbers to bf16; where a last digit differs, one that is rounded can, too."""
    spec, dropout = replace(SPEC, num_layers=layers), dropout_of(*kinds)
    params, context, tokens, *gradients = inputs(batch, layers)
    found, stored = cluster.forward(spec, params, context, tokens, dropout, interpreter())
    expected, plain = reference.forward(spec, params, context, tokens, dropout)
    assert error(found, expected) < 3e-3  # the activations are rounded once more
    assert np.any(np.abs(expected[0]) == 10)
    ours = cluster.backward(spec, params, stored, dropout, *gradients, interpreter())
    assert error(ours, reference.backward(spec, params, plain, dropout, *gradients)) < 5e-3
    later, _ = reference.forward(spec, params, context.at[0, 0].add(1), tokens, dropout)
    assert error(found, later) > 6e-3  # a mistake in one number would be seen


def check_members_of_a_vmap():
    params, context, tokens, *gradients = inputs(50, 2)
    spec = replace(SPEC, num_layers=2)

    def run(context, tokens):
        results, stored = cluster.forward(spec, params, context, tokens, CellDropout(), interpreter())
        return results, cluster.backward(spec, params, stored, CellDropout(), *gradients, interpreter())

    found = jax.vmap(run)(jnp.stack([context, -context]), jnp.stack([tokens, 2 * tokens]))
    for number, alone in enumerate((run(context, tokens), run(-context, 2 * tokens))):
        results, gradient = jax.tree.map(lambda x, number=number: x[number], found)
        assert error(results, alone[0]) == 0
        assert error(gradient, alone[1]) < 1e-6  # products of several members are one of XLA's


def check_rows_of_the_masks():
    params, context, tokens, *_ = inputs(60, 2)
    spec, first = replace(SPEC, num_layers=2), 20
    (_, whole), _ = cluster.forward(spec, params, context, tokens, dropout_of("step"), interpreter())
    moved = CellDropout(Dropout.from_key(jax.random.key(3), Rate.from_share(0.1), first * WIDTH))
    for texts, same in ((60, True), (None, False)):
        part = replace(spec, mask_texts=texts)
        (_, found), _ = cluster.forward(part, params, context[first:], tokens[:, first:], moved, interpreter())
        assert (error(found, whole[:, first:]) == 0) == same


@pytest.mark.parametrize(
    "checks",
    [
        "check_results_and_gradients(50, 3); check_results_and_gradients(100, 2)",
        "check_results_and_gradients(50, 3, 'step'); check_results_and_gradients(64, 2, 'step', 'text')",
        "check_rows_of_the_masks(); check_members_of_a_vmap()",
    ],
)
def test_results_gradients_masks_and_members(checks):
    """In a process whose JAX has a thread for each program of a kernel, for they wait for each other."""
    if reason := back_end.mosaic_obstacle():
        pytest.skip(reason)
    code, threads = f"from {__name__} import *; {checks}; print('checked')", {"NPROC": "16"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | threads, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert found.stdout.endswith("checked\n"), found.stderr


def test_chunks_are_read_in_the_order_of_the_products():
    """By blocks: the columns of each kernel, in tiles of 64 x 64 as `[out, in]`, along the inner dimension."""
    first, second = (jnp.arange(256 * 256, dtype=jnp.float32).reshape(256, 256) % number for number in (251, 241))
    chunks = np.asarray(cluster._chunks([first, second]), np.float32)
    assert chunks.shape == (4, 4, 2, 64, 64)
    for block in range(4):
        for number, kernel in enumerate((first, second)):
            for tile in range(4):
                inner, outer = slice(64 * tile, 64 * tile + 64), slice(64 * block, 64 * block + 64)
                expected = np.asarray(kernel)[inner, outer].T
                np.testing.assert_array_equal(chunks[block, 2 * number + tile // 2, tile % 2], expected)


@pytest.mark.parametrize("layers", [2, 16])
@pytest.mark.parametrize("width", cluster_tiling.WIDTHS)
def test_kernels_of_whole_clusters_are_translated_and_fit_into_shared_memory(program_for_a_gpu, width, layers):
    """16 layers of 512 are the most that do; Mosaic refuses what needs more."""
    if reason := back_end.mosaic_obstacle():
        pytest.skip(reason)
    spec = CellSpec(width, width, layers, "plain", "bf16", "cluster")
    function, shapes = gradient_of_a_loss(spec, dropout_of("step", "text"), 70, 63)
    program = program_for_a_gpu(function, *shapes)
    assert program.count("mosaic_gpu") > 1


@pytest.fixture
def hopper(monkeypatch):
    """As on an H100 with a JAX that has both back ends."""
    monkeypatch.setattr(cluster_tiling, "multiprocessors", lambda: 132)
    monkeypatch.setattr(cluster, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(cluster, "mosaic_obstacle", lambda: "")
    monkeypatch.setattr(gpu, "triton_obstacle", lambda: "")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": "tf32"}, "not in tf32"),
        ({"cell": "residual"}, "no residual cell"),
        ({"context_dim": 256}, "must be the same"),
        ({"hidden_dim": 1024, "context_dim": 1024}, "256 or 512"),
        ({"num_layers": 1}, "2 or more"),
        ({"num_layers": 120}, "32 bits"),
        ({"num_layers": 17}, "232552 bytes of shared memory, and this GPU has 232448"),
    ],
)
def test_what_a_cell_cannot_be(change, reason):
    assert cluster.obstacle(replace(ADVANCED, num_layers=16), 512, 63) == ""
    assert reason in cluster.obstacle(replace(ADVANCED, **change), 512, 63)
    assert not cluster.supports(replace(ADVANCED, **change), 512, 63)


def test_another_gpu_or_an_older_jax_has_no_clusters(monkeypatch):
    monkeypatch.setattr(cluster, "mosaic_obstacle", lambda: "")
    monkeypatch.setattr(cluster, "compute_capability", lambda: "8.9")
    assert "compute capability 9.0" in cluster.obstacle(ADVANCED, 512, 63)
    monkeypatch.undo()
    monkeypatch.setattr(cluster, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(back_end, "OLDEST_MOSAIC", (99, 1))
    assert cluster.obstacle(ADVANCED, 512, 63) == "it needs JAX 99.1 or newer"
    monkeypatch.setattr(back_end, "OLDEST_MOSAIC", (0, 1))
    monkeypatch.setitem(sys.modules, back_end.MOSAIC, None)
    assert cluster.obstacle(ADVANCED, 512, 63) == f"this version of JAX has no {back_end.MOSAIC}"


@pytest.mark.usefixtures("hopper")
def test_clusters_are_chosen_where_they_are_faster_or_there_is_nothing_else(monkeypatch):
    """From 256 texts of 512 columns to 14 clusters of 8 blocks, or 28 of 4; members of a sweep all count."""

    def chosen(batch, members=1, **change):
        return forms_for(replace(ADVANCED, **change), batch, 63, members)[0]

    assert [chosen(batch) for batch in (255, 256, 896, 897)] == ["gpu", "cluster", "cluster", "gpu"]
    narrow = {"hidden_dim": 256, "context_dim": 256}
    assert [chosen(batch, **narrow) for batch in (511, 512, 1792, 1793)] == ["gpu", "cluster", "cluster", "gpu"]
    assert [chosen(100, members) for members in (2, 3, 7, 8)] == ["gpu", "cluster", "cluster", "gpu"]
    assert chosen(16, 4) == "gpu"  # few texts, however many rows fill up their clusters
    assert chosen(512, context_dim=256) == "gpu"
    assert forms_for(ADVANCED, 512, 63)[:2] == ["cluster", "gpu"]
    monkeypatch.setattr(gpu, "triton_obstacle", lambda: "gone")
    assert [chosen(batch) for batch in (32, 256, 897)] == ["cluster"] * 3
    assert kernel_obstacle(ADVANCED, 32, 63) == ""
    assert kernel_obstacle(replace(ADVANCED, cell="residual"), 32, 63) == "gone"
