"""A token through all layers as one GPU kernel, on a CPU: its thread blocks are threads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")

from newllm_jax.smollm import token_kernel
from newllm_jax.smollm.kernel_weights import kernels_of
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2, rotary_embedding
from newllm_jax.smollm.token_step import run_layers, unstack_caches, unstack_layers
from tests.blocks_as_threads import Blocks, Memory, run_blocks_as_threads

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=192, intermediate_size=128, num_layers=2, num_heads=3, num_kv_heads=1, max_position=512
)
TWO_SLICES = LlamaConfig(  # rows of 3 chunks, the last one half full; of five heads, in a slice of 4, one and a half
    vocab_size=64, hidden_size=320, intermediate_size=384, num_layers=2, num_heads=5, num_kv_heads=1, max_position=512
)
ONE_HEAD = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=1, num_kv_heads=1, max_position=512
)
CAPACITY = 320  # more than SPLITS * POSITIONS: the first splits have two pieces


class Layers:
    """Layers with random parameters, a cache and a token, and what they make of it one by one."""

    def __init__(self, config: LlamaConfig, position: int, key_scale: float = 1.0) -> None:
        params = SmolLM2(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        draw = np.random.default_rng(0)
        blocks = jax.tree.map(  # scales that tell the norms apart
            lambda leaf: leaf * 4 if leaf.ndim == 3 else jnp.asarray(draw.uniform(0.5, 2, leaf.shape), jnp.float32),
            params["backbone"]["blocks"],
        )
        shape = (config.num_layers, 1, CAPACITY, config.num_kv_heads, config.head_dim)
        self.config, self.position = config, jnp.int32(position)
        self.keys, self.values = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for _ in range(2))
        self.keys = key_scale * self.keys
        self.x = jnp.asarray(draw.standard_normal((1, config.hidden_size)), jnp.float32)
        self.kernels, caches = kernels_of(blocks), unstack_caches(self.keys, self.values)
        self.expected, self.caches = run_layers(config, "fp32", unstack_layers(blocks), caches, self.x, self.position)
        angles = rotary_embedding(self.position[None], config.head_dim, config.rope_theta)
        self.rotary = jnp.stack([part[0] for part in angles])

    def run(self, blocks):
        """The kernel, with so many blocks."""
        caches = self.keys[:, 0], self.values[:, 0]
        return token_kernel.run_layers(self.config, self.kernels, caches, self.x[0], self.position, self.rotary, blocks)


@pytest.mark.parametrize(
    ("config", "position", "blocks"), [
        (CONFIG, 0, 3), (CONFIG, 37, 12), (CONFIG, 300, 3), (CONFIG, 300, 12), (TWO_SLICES, 290, 5),
        (CONFIG, 256, 12), (CONFIG, 319, 12), (CONFIG, 37, 30), (ONE_HEAD, 32, 3),
    ],
)  # fmt: skip
def test_blocks_that_wait_for_each_other_compute_the_layers(monkeypatch, config, position, blocks):
    layers = Layers(config, position)
    launches = run_blocks_as_threads(monkeypatch)
    found, (new_keys, new_values) = layers.run(blocks)
    assert launches == [blocks]
    np.testing.assert_allclose(found, layers.expected[0], rtol=1e-5, atol=1e-5)
    for layer, (key, value) in enumerate(layers.caches):
        np.testing.assert_allclose(new_keys[layer], key[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new_values[layer], value[0], rtol=1e-5, atol=1e-5)


class AfterWait(Memory):
    """What other blocks write: whoever reads it has to add the zero of a wait to the layer, which is `MARK` here."""

    def __getitem__(self, index):
        assert int(index[0]) >= MARK, "read without the zero of a wait: a GPU may read it before"
        return super().__getitem__((int(index[0]) - MARK, *index[1:]))


MARK = 100  # more than the layers


def test_what_other_blocks_wrote_is_read_with_the_zero_of_a_wait(monkeypatch):
    layers, wait, run = Layers(CONFIG, 37), token_kernel.wait_for_blocks, Blocks.run

    def marked_wait(*arguments):
        arrivals, zero, prefetched = wait(*arguments)
        return arrivals, zero + MARK, prefetched

    def run_marked(blocks, kernel, memories):
        scratch = len(token_kernel.Results._fields) - 2  # all but keys and values; the counter is last
        marked = [AfterWait(memory.array) for memory in memories[-scratch - 1 : -1]]
        run(blocks, kernel, [*memories[: -scratch - 1], *marked, memories[-1]])

    run_blocks_as_threads(monkeypatch)
    monkeypatch.setattr(token_kernel, "wait_for_blocks", marked_wait)
    monkeypatch.setattr(Blocks, "run", run_marked)
    np.testing.assert_allclose(layers.run(3)[0], layers.expected[0], rtol=1e-5, atol=1e-5)


def test_the_exponential_of_a_score_need_not_be_a_float32_number(monkeypatch):
    layers = Layers(CONFIG, 300, key_scale=100.0)  # scores of hundreds, in which rounding is as large
    run_blocks_as_threads(monkeypatch)
    np.testing.assert_allclose(layers.run(12)[0], layers.expected[0], rtol=0, atol=0.02)


def test_a_cache_of_another_capacity_is_refused():
    cache = jnp.zeros((CONFIG.num_layers, 40, CONFIG.num_kv_heads, CONFIG.head_dim))
    with pytest.raises(ValueError, match="room for 40 tokens, no multiple of 32"):
        token_kernel.run_layers(CONFIG, None, (cache, cache), jnp.zeros(192), jnp.int32(0), jnp.zeros((2, 32)), 3)
