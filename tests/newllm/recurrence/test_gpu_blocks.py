"""The GPU kernels of the time loop with several thread blocks a group, on a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")

from benchmarks.subjects.phases import phase_counts
from newllm_jax.config import Cell
from newllm_jax.newllm.dropout import Dropout, Rate
from newllm_jax.newllm.recurrence import gpu, gpu_group
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec
from newllm_jax.newllm.recurrence.gpu_tiling import Tiling
from tests.blocks_as_threads import run_blocks_as_threads

TIME, BATCH, HIDDEN, CONTEXT, LAYERS = 2, 20, 32, 16, 3
DROPOUT = CellDropout(Dropout(jnp.array([3, 4], jnp.uint32), Rate.from_share(0.25)))


class Untraced:
    """`jax.custom_batching.custom_vmap` of a function that is called with arrays, not traced."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def def_vmap(self, rule: Any) -> Any:
        return rule


@pytest.fixture
def blocks_as_threads(monkeypatch) -> list[int]:
    monkeypatch.setattr(jax.custom_batching, "custom_vmap", Untraced)
    return run_blocks_as_threads(monkeypatch)


def both_ways(cell: Cell, blocks: int, interpret: bool, rows: int = 16) -> tuple[Any, Any, Any]:
    """All steps forward and backward, with dropout."""
    draw = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(0.3 * draw.standard_normal(shape), jnp.float32)

    params = CellParams(
        context_in=array(CONTEXT, HIDDEN),
        hidden=tuple((array(HIDDEN, HIDDEN), array(HIDDEN)) for _ in range(LAYERS - 1)),
        gates=(array(HIDDEN, 3 * CONTEXT), array(3 * CONTEXT)),
        norm=(1 + 20 * array(CONTEXT), array(CONTEXT)),
    )
    context, tokens = array(BATCH, CONTEXT) + jnp.arange(CONTEXT), array(TIME, BATCH, HIDDEN)
    tiling = Tiling(rows, blocks, depth=16, warps=4, stages=1)
    spec, options = CellSpec(HIDDEN, CONTEXT, LAYERS, cell), {"tiling": tiling, "interpret": interpret}
    results, stored = gpu.forward(spec, params, context, tokens, DROPOUT, **options)
    d_last, d_outputs = array(BATCH, CONTEXT), array(TIME, BATCH, HIDDEN)
    gradients = gpu.backward(spec, params, stored, DROPOUT, d_last, d_outputs, **options)
    return results, stored._replace(state_squares=None), gradients  # of which each block has its share


def assert_equal(together: Any, alone: Any) -> None:
    for ours, reference in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        largest = float(jnp.abs(reference).max())
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=5e-6 * largest)


@pytest.mark.parametrize("cell", ["plain", "residual"])
def test_four_blocks_that_share_the_columns_compute_what_one_alone_does(cell, request):
    alone = both_ways(cell, 1, interpret=True)
    launches = request.getfixturevalue("blocks_as_threads")
    together = both_ways(cell, 4, interpret=False)
    assert launches == [2 * 4] * 2  # two groups of 16 rows for a batch of 20, each way
    assert_equal(together, alone)


@pytest.mark.parametrize("group", [0, 4])
def test_blocks_without_rows_of_their_own_leave_those_of_others_alone(monkeypatch, group):
    """Four blocks share two rows: two of them have none in the phase in which a block has whole rows."""
    alone = both_ways("residual", 1, interpret=True, rows=2)
    monkeypatch.setattr(jax.custom_batching, "custom_vmap", Untraced)
    launches = run_blocks_as_threads(monkeypatch, group)
    assert_equal(both_ways("residual", 4, interpret=False, rows=2), alone)
    assert launches == [10 * 4] * 2


@pytest.mark.parametrize("cell", ["plain", "residual"])
def test_a_kernel_waits_after_each_phase_that_the_benchmark_counts(cell, request, monkeypatch):
    request.getfixturevalue("blocks_as_threads")
    waits, wait = [0], gpu_group.wait_for_blocks

    def counted(*arguments):
        waits[-1] += 1
        return wait(*arguments)

    monkeypatch.setattr(gpu_group, "wait_for_blocks", counted)
    backward = gpu.backward
    monkeypatch.setattr(gpu, "backward", lambda *given, **options: (waits.append(0), backward(*given, **options))[1])
    both_ways(cell, 4, interpret=False)
    blocks = 2 * 4
    expected = phase_counts(CellSpec(HIDDEN, CONTEXT, LAYERS, cell), TIME)
    assert waits == [blocks * (expected[name] + 1) for name in ("forward", "backward")]  # 1 before the first step
