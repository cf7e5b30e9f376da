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
from newllm_jax.newllm.recurrence import cluster, gpu, reference
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec
from newllm_jax.newllm.recurrence.scan import form_for, forms_for, kernel_obstacle
from newllm_jax.training import back_end

WIDTH, TIME = 64, 3
SPEC = CellSpec(WIDTH, WIDTH, 3, "plain", "bf16", "cluster")
ADVANCED = CellSpec(512, 512, 12, "plain", "bf16")


@pytest.fixture
def interpreted():
    """What makes a kernel be interpreted."""
    if reason := back_end.mosaic_obstacle():
        pytest.skip(reason)
    return interpreter()


def interpreter():
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


def check_results_and_gradients(interpreted, batch, layers, *kinds):
    """Both round the same numbers to bf16; where a last digit differs, one that is rounded can, too."""
    spec, dropout = replace(SPEC, num_layers=layers), dropout_of(*kinds)
    params, context, tokens, *gradients = inputs(batch, layers)
    found, stored = cluster.forward(spec, params, context, tokens, dropout, interpreted)
    expected, plain = reference.forward(spec, params, context, tokens, dropout)
    assert error(found, expected) < 3e-3  # the activations are rounded once more
    assert np.any(np.abs(expected[0]) == 10)
    ours = cluster.backward(spec, params, stored, dropout, *gradients, interpreted)
    assert error(ours, reference.backward(spec, params, plain, dropout, *gradients)) < 5e-3
    later, _ = reference.forward(spec, params, context.at[0, 0].add(1), tokens, dropout)
    assert error(found, later) > 6e-3  # a mistake in one number would be seen


@pytest.mark.parametrize(("batch", "layers"), [(50, 3), (100, 2)])
def test_results_and_gradients_equal_the_plain_loops(interpreted, batch, layers):
    check_results_and_gradients(interpreted, batch, layers)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "check",
    [
        "check_results_and_gradients(interpreter(), 50, 3, 'step')",
        "check_results_and_gradients(interpreter(), 64, 2, 'step', 'text')",
        "check_rows_of_the_masks(interpreter())",
    ],
)
def test_with_dropout(check):
    """In a process whose JAX has a thread for each of a block's programs, which wait for each other, on any machine."""
    code = f"from {__name__} import *; {check}; print('checked')"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"NPROC": "16"}, capture_output=True, text=True, timeout=300
    )
    assert found.stdout.endswith("checked\n"), found.stderr


def test_members_of_a_vmap_have_the_numbers_that_each_has_alone(interpreted):
    params, context, tokens, *_ = inputs(50, 2)
    spec = replace(SPEC, num_layers=2)

    def run(context, tokens):
        return cluster.forward(spec, params, context, tokens, CellDropout(), interpreted)[0]

    found = jax.vmap(run)(jnp.stack([context, -context]), jnp.stack([tokens, 2 * tokens]))
    for number, alone in enumerate((run(context, tokens), run(-context, 2 * tokens))):
        assert error(jax.tree.map(lambda x, number=number: x[number], found), alone) == 0


def check_rows_of_the_masks(interpreted):
    params, context, tokens, *_ = inputs(60, 2)
    spec, first = replace(SPEC, num_layers=2), 20
    (_, whole), _ = cluster.forward(spec, params, context, tokens, dropout_of("step"), interpreted)
    moved = CellDropout(Dropout.from_key(jax.random.key(3), Rate.from_share(0.1), first * WIDTH))
    for texts, same in ((60, True), (None, False)):
        part = replace(spec, mask_texts=texts)
        (_, found), _ = cluster.forward(part, params, context[first:], tokens[:, first:], moved, interpreted)
        assert (error(found, whole[:, first:]) == 0) == same


def test_chunks_are_read_in_the_order_of_the_products():
    """By blocks: the columns of each kernel, in tiles of 64 x 64 as `[out, in]`, along the inner dimension."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    first, second = (jnp.arange(256 * 256, dtype=jnp.float32).reshape(256, 256) % number for number in (251, 241))
    chunks = np.asarray(cluster._chunks([first, second]), np.float32)
    assert chunks.shape == (4, 4, 2, 64, 64)
    for block in range(4):
        for number, kernel in enumerate((first, second)):
            for tile in range(4):
                inner, outer = slice(64 * tile, 64 * tile + 64), slice(64 * block, 64 * block + 64)
                expected = np.asarray(kernel)[inner, outer].T
                np.testing.assert_array_equal(chunks[block, 2 * number + tile // 2, tile % 2], expected)


@pytest.fixture
def hopper(monkeypatch):
    """As on an H100 with a JAX that has the back end."""
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
    ],
)
def test_what_a_cell_cannot_be(change, reason):
    assert cluster.obstacle(ADVANCED, 512, 63) == ""
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


@pytest.mark.usefixtures("hopper")
def test_clusters_are_chosen_where_they_are_faster_or_there_is_nothing_else(monkeypatch):
    """From 4 clusters of 8 blocks to 14, or 8 of 4 to 28; and members of a sweep are computed side by side."""

    def chosen(batch, members=1, **change):
        return form_for(replace(ADVANCED, **change), batch, 63, members)

    assert [chosen(batch) for batch in (192, 193, 896, 897)] == ["gpu", "cluster", "cluster", "gpu"]
    narrow = {"hidden_dim": 256, "context_dim": 256}
    assert [chosen(batch, **narrow) for batch in (448, 449, 1792, 1793)] == ["gpu", "cluster", "cluster", "gpu"]
    assert [chosen(100, members) for members in (1, 2, 7, 8)] == ["gpu", "cluster", "cluster", "gpu"]
    assert chosen(512, context_dim=256) == "gpu"
    assert forms_for(ADVANCED, 512, 63)[:2] == ["cluster", "gpu"]
    monkeypatch.setattr(gpu, "triton_obstacle", lambda: "gone")
    assert [chosen(batch) for batch in (192, 193, 897)] == ["cluster"] * 3
    assert kernel_obstacle(ADVANCED, 32, 63) == ""
    assert kernel_obstacle(replace(ADVANCED, cell="residual"), 32, 63) == "gone"
