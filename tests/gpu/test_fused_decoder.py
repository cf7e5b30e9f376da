"""One text of SmolLM2 with all layers of a token in one kernel, beside the decoder of XLA's products.

On a CPU, `tests/smollm/test_token_kernel.py` compares the same numbers. Only a GPU shows whether its thread blocks, all
running at the same time, wait for each other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.smollm.decoder import BaseDecoder
from newllm_jax.smollm.fused_decoder import FusedDecoder, decoder_for
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2

TIED = LlamaConfig(vocab_size=512, hidden_size=576, intermediate_size=1536, num_layers=4, max_position=512)
UNTIED = LlamaConfig(
    vocab_size=512, hidden_size=192, intermediate_size=128, num_layers=2, num_heads=6, num_kv_heads=3, max_position=512,
    tie_embeddings=False,
)  # fmt: skip
TOKENS, CAPACITY = 300, 320
LARGEST_ERRORS = {
    "float32": 1e-4,
    "bfloat16": 0.05,
}  # relative; bf16 rounds activations in the one and not in the other


def logits(decoder, params, ids):
    """Of what follows each of `ids`, `[tokens, V]`."""

    @jax.jit
    def read(params, ids):
        weights = decoder.prepare(params)
        cache = decoder.start(params, jnp.zeros((1, 32), jnp.int32), jnp.int32(0), CAPACITY)

        def step(cache, token):
            cache, found, _ = decoder.step(weights, cache, token[None])
            return cache, found[0]

        return jax.lax.scan(step, cache, ids)[1]

    return np.asarray(read(params, ids))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_kernel_predicts_what_the_layers_one_by_one_do(config, dtype):
    model = SmolLM2(config, dtype=dtype)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: leaf * (3 if leaf.ndim == 3 else 1), params)
    ids = jax.random.randint(jax.random.key(1), (TOKENS,), 0, config.vocab_size)
    decoder = decoder_for(model, texts=1)
    assert isinstance(decoder, FusedDecoder)
    expected, found = logits(BaseDecoder(model), params, ids), logits(decoder, params, ids)
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    allowed = LARGEST_ERRORS[jnp.dtype(dtype).name]
    assert errors.max() < allowed
    other = logits(BaseDecoder(model), params, ids.at[0].add(1))
    changed = np.linalg.norm(other - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert changed[:32].max() > 2 * allowed  # another first token would be seen
    np.testing.assert_array_equal(logits(decoder, params, ids), found)  # the same bits every time
