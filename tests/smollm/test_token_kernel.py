"""A token through all layers as one GPU kernel, on a CPU: its thread blocks are threads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")

from newllm_jax.smollm import token_kernel
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2, rotary_embedding
from newllm_jax.smollm.token_step import run_layers, unstack_caches, unstack_layers
from tests.blocks_as_threads import run_blocks_as_threads

pytestmark = pytest.mark.quick

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=192, intermediate_size=128, num_layers=2, num_heads=3, num_kv_heads=1, max_position=512
)
TWO_SLICES = LlamaConfig(  # rows of 3 chunks, the last one half full; five query heads, for which there are 8 rows
    vocab_size=64, hidden_size=320, intermediate_size=384, num_layers=2, num_heads=5, num_kv_heads=1, max_position=512
)
CAPACITY = 320  # more than SPLITS * POSITIONS: the first splits have two pieces


@pytest.mark.parametrize(
    ("config", "position", "blocks"), [
        (CONFIG, 0, 3), (CONFIG, 37, 12), (CONFIG, 300, 3), (CONFIG, 300, 12), (TWO_SLICES, 290, 5),
    ],
)  # fmt: skip
def test_blocks_that_wait_for_each_other_compute_the_layers(monkeypatch, config, position, blocks):
    model = SmolLM2(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    draw = np.random.default_rng(0)
    blocks_params = jax.tree.map(  # scales that tell the norms apart
        lambda leaf: leaf * 4 if leaf.ndim == 3 else jnp.asarray(draw.uniform(0.5, 2, leaf.shape), jnp.float32),
        params["backbone"]["blocks"],
    )
    shape = (config.num_layers, 1, CAPACITY, config.num_kv_heads, config.head_dim)
    keys, values = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for _ in range(2))
    x = jnp.asarray(draw.standard_normal((1, config.hidden_size)), jnp.float32)
    at = jnp.int32(position)
    expected, caches = run_layers(config, "fp32", unstack_layers(blocks_params), unstack_caches(keys, values), x, at)
    rotary = jnp.stack([part[0] for part in rotary_embedding(at[None], config.head_dim, config.rope_theta)])
    kernels = token_kernel.kernels_of(blocks_params)

    launches = run_blocks_as_threads(monkeypatch)
    found, (new_keys, new_values) = token_kernel.run_layers(
        config, kernels, (keys[:, 0], values[:, 0]), x[0], at, rotary, blocks
    )
    assert launches == [blocks]
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-5)
    for layer, (key, value) in enumerate(caches):
        np.testing.assert_allclose(new_keys[layer], key[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new_values[layer], value[0], rtol=1e-5, atol=1e-5)


def test_a_cache_of_another_capacity_is_refused():
    cache = jnp.zeros((CONFIG.num_layers, 40, CONFIG.num_kv_heads, CONFIG.head_dim))
    with pytest.raises(ValueError, match="room for 40 tokens, no multiple of 32"):
        token_kernel.run_layers(CONFIG, None, (cache, cache), jnp.zeros(192), jnp.int32(0), jnp.zeros((2, 32)), 3)
