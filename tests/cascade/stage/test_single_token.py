"""The blocks on texts of one token compute what the whole Llama computes, and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade.stage.single_token import run_blocks
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2, parameter_shapes

pytestmark = pytest.mark.quick

TOKENS = 5
CONFIG = LlamaConfig(
    vocab_size=11, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4
)


@pytest.fixture(scope="module")
def blocks():
    draw = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: ("norm" in jax.tree_util.keystr(path)) + 0.3 * draw.standard_normal(leaf.shape, np.float32),
        parameter_shapes(CONFIG)["backbone"]["blocks"],
    )


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (TOKENS, CONFIG.hidden_size))


def whole(blocks, x):
    """The residual stream through `Backbone`, with queries, keys and softmax."""
    norm = {"scale": jnp.ones(CONFIG.hidden_size)}
    params = {"backbone": {"blocks": blocks, "norm": norm}}
    return SmolLM2(CONFIG).apply({"params": params}, x[:, None, :], method="from_hidden").residual[:, 0, :]


def test_equals_the_whole_llama(blocks, x):
    found = jax.jit(lambda: run_blocks(CONFIG, "fp32", blocks, x))()
    expected = jax.jit(whole)(blocks, x)
    assert float(jnp.abs(expected - x).max()) > 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_the_whole_llamas(blocks, x):
    weights = jax.random.normal(jax.random.key(2), x.shape)

    def gradients(function):
        return jax.jit(jax.grad(lambda blocks, x: jnp.sum(function(blocks, x) * weights), argnums=(0, 1)))(blocks, x)

    found = gradients(lambda blocks, x: run_blocks(CONFIG, "fp32", blocks, x))
    expected = gradients(whole)
    for (path, ours), reference in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        unread = any(name in jax.tree_util.keystr(path) for name in ("q_proj", "k_proj"))
        assert (float(jnp.abs(reference).max()) == 0) == unread
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5 * max(float(jnp.abs(reference).max()), 1e-9))
