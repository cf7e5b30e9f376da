"""The GPU kernels of the time loop are translated for NVIDIA GPUs, at the sizes of real models, on any machine."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")

from newllm_jax.newllm.dropout import Dropout, Rate
from newllm_jax.newllm.recurrence import gpu_tiling
from newllm_jax.newllm.recurrence.cell import CellDropout, CellSpec
from tests.newllm.recurrence.lowering import gradient_of_a_loss

pytestmark = pytest.mark.quick

TIME, HIDDEN, CONTEXT, LAYERS = 63, 512, 256, 3


@pytest.mark.parametrize("cell", ["plain", "residual"])
@pytest.mark.parametrize("kinds", [(), ("step", "text")], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("batch", [128, 32], ids="batch {}".format)  # few rows have more blocks
def test_both_kernels_are_translated(monkeypatch, program_for_a_gpu, cell, kinds, precision, batch):
    monkeypatch.setattr(gpu_tiling, "multiprocessors", lambda: 132)
    spec = CellSpec(HIDDEN, CONTEXT, LAYERS, cell, precision, "gpu")
    masks = Dropout(jnp.array([3, 4], jnp.uint32), Rate.from_share(0.1))
    dropout = CellDropout(*(masks if kind in kinds else None for kind in ("step", "text")))

    function, shapes = gradient_of_a_loss(spec, dropout, batch, TIME)
    program = program_for_a_gpu(function, *shapes)
    assert all(program.count(f'name = "{name}"') == 1 for name in ("forward_kernel", "backward_kernel"))
