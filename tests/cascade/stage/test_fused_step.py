"""A stage's update through the GPU kernels, interpreted on a CPU, beside the plain one."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")

from newllm_jax.cascade.stage import kernels
from newllm_jax.cascade.stage.fused_step import stage_step
from newllm_jax.cascade.stage.model import Stage, init_stage
from newllm_jax.cascade.stage.updates import kernel_obstacle, next_token_loss
from newllm_jax.config import CascadeConfig
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import rms_norm
from newllm_jax.training.optimizer import adamw
from newllm_jax.training.step import init_state, train_step

pytestmark = pytest.mark.quick

BATCH = 16
HIDDEN = 192  # no power of two, as that of SmolLM2
STAGE = Stage(
    LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
    )
)
KEY, HIGHEST = jax.random.key(0), jax.lax.Precision.HIGHEST


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.standard_normal((BATCH, HIDDEN), np.float32))
    return hidden, jnp.asarray(draw.integers(0, 128, BATCH), jnp.int32)


def test_updates_equal_the_plain_ones(batch):
    config = CascadeConfig(learning_rate=1e-2, weight_decay=0.1)
    optimizer = adamw(config.learning_rate, config.weight_decay)
    present = jnp.arange(BATCH) < BATCH - 3
    plain = jax.jit(partial(train_step, next_token_loss(STAGE), optimizer))
    fused = jax.jit(partial(stage_step, STAGE, config, optimizer, interpret=True))
    expected = found = init_state(init_stage(STAGE, 0, 1), optimizer)
    for _ in range(3):
        expected, totals = plain(expected, batch, present, KEY)
        found, ours = fused(found, batch, present, KEY)
        assert int(ours.sums.count) == BATCH - 3
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(totals), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    begun = init_stage(STAGE, 0, 1)
    for (path, one), other, start in zip(
        jax.tree_util.tree_leaves_with_path(found.params),
        jax.tree.leaves(expected.params),
        jax.tree.leaves(begun),
        strict=True,
    ):
        moved = float(jnp.abs(other - start).max())
        assert moved > 1e-5, path
        np.testing.assert_allclose(one, other, atol=0.02 * moved, err_msg=str(path))
    for one, other in zip(jax.tree.leaves(found.opt_state), jax.tree.leaves(expected.opt_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * max(float(jnp.abs(other).max()), 1e-12))


@pytest.mark.parametrize("depth", [64, 192])
def test_products_are_those_of_the_layer(monkeypatch, depth):
    monkeypatch.setattr(kernels, "PRODUCT_TILING", kernels.PRODUCT_TILING._replace(columns=32, depth=depth))
    draw = np.random.default_rng(0)
    stacks = [jnp.asarray(draw.standard_normal((3, 192, 128), np.float32)) for _ in range(2)]
    operand = jnp.asarray(draw.standard_normal((32, 192), np.float32))
    gradients = [jnp.asarray(draw.standard_normal((32, 128), np.float32)) for _ in range(2)]
    exact = [np.asarray(stack[1], np.float64) for stack in stacks]
    scales = 1 + jnp.asarray(draw.standard_normal((3, 192), np.float32))
    normed = rms_norm(operand, scales[1], 1e-5)
    for given, expected in ((None, operand), (scales, normed)):
        found = kernels.forward(operand, stacks, 1, given, epsilon=1e-5, precision=HIGHEST, interpret=True)
        for one, kernel in zip(found, exact, strict=True):
            np.testing.assert_allclose(one, np.asarray(expected) @ kernel, rtol=1e-4, atol=1e-4)
    expected = sum(np.asarray(d) @ kernel.T for d, kernel in zip(gradients, exact, strict=True))
    found = kernels.backward(gradients, stacks, 1, precision=HIGHEST, interpret=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sizes, batch_size, precision, reason",
    [
        ({}, 32, "fp32", "not in fp32"),
        ({}, 24, "tf32", "batch_size must be one of 16, 32, 64"),
        ({"intermediate_size": 200}, 32, "tf32", "no multiples of 64"),
    ],
)
def test_where_the_kernels_cannot_be_used(sizes, batch_size, precision, reason):
    assert reason in kernel_obstacle(Stage(LlamaConfig(**sizes), precision), batch_size)
    assert not kernel_obstacle(Stage(LlamaConfig(), "tf32"), 32)
