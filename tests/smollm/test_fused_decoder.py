"""One text of a SmolLM2 with all layers of a token in one kernel, on a CPU: its thread blocks are threads."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton", reason="this JAX has no Triton back end of Pallas")

from newllm_jax.config import FinetuneConfig
from newllm_jax.decoding.batches import Batches
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.errors import Note
from newllm_jax.finetuning.run import slow_generation_warning
from newllm_jax.smollm import fused_decoder
from newllm_jax.smollm.decoder import BaseDecoder
from newllm_jax.smollm.fused_decoder import FusedDecoder, decoder_for, kernel_obstacle, slow_text_warning
from newllm_jax.smollm.generate import generate_answers, generate_tokens
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.smollm.pretrained import load_smollm2
from tests.blocks_as_threads import run_blocks_as_threads

pytestmark = pytest.mark.quick

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=192, intermediate_size=128, num_layers=2, num_heads=6, num_kv_heads=3, max_position=512
)
CAPACITY = 40  # filled up to 64 by the kernel's
BLOCKS = 5


def model_and_params(config, dtype=jnp.float32):
    model = SmolLM2(config, dtype=dtype)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: leaf * (4 if leaf.ndim == 3 else 1), params)
    scales = np.random.default_rng(0).uniform(0.5, 2, (config.num_layers, config.hidden_size))
    for part in ("attention_norm", "mlp_norm"):  # scales that are not 1, which are rounded with the weights
        params["backbone"]["blocks"][part]["scale"] *= scales.astype(np.float32)
    return model, params


@pytest.mark.parametrize("tied, dtype", [(True, jnp.float32), (False, jnp.float32), (True, jnp.bfloat16)])
def test_a_text_goes_on_as_with_the_layers_one_by_one(monkeypatch, tied, dtype):
    model, params = model_and_params(replace(CONFIG, tie_embeddings=tied), dtype)
    allowed = 1e-4 if dtype == jnp.float32 else 0.05
    prompt, plain, fused = jnp.arange(35).reshape(1, 35) % 64, BaseDecoder(model), FusedDecoder(model, BLOCKS)
    caches = [
        jax.jit(decoder.start, static_argnums=3)(params, prompt, jnp.int32(33), CAPACITY) for decoder in (plain, fused)
    ]
    weights = [decoder.prepare(params) for decoder in (plain, fused)]
    expected, plain_step = [], jax.jit(plain.step)
    for token in (5, 60):
        caches[0], logits, _ = plain_step(weights[0], caches[0], jnp.array([token]))
        expected.append(logits)
    run_blocks_as_threads(monkeypatch)
    for token, logits in zip((5, 60), expected, strict=True):
        caches[1], found, exits = fused.step(weights[1], caches[1], jnp.array([token]))
        assert exits.tolist() == [0]
        assert found.dtype == logits.dtype
        np.testing.assert_allclose(found, logits, rtol=allowed, atol=allowed)
    assert {leaf.dtype for leaf in weights[1].layers if leaf.ndim == 3} == {jnp.dtype(dtype)}
    assert float(jnp.abs(expected[0] - expected[1]).max()) > 0.1  # the second token sees the first
    assert int(caches[1].length) == 35


def test_a_token_outside_the_cache_gives_nan_and_leaves_the_cache_alone(monkeypatch):
    model, params = model_and_params(CONFIG)
    decoder = FusedDecoder(model, BLOCKS)
    cache = jax.jit(decoder.start, static_argnums=3)(params, jnp.zeros((1, 8), jnp.int32), jnp.int32(8), CAPACITY)
    weights = decoder.prepare(params)
    run_blocks_as_threads(monkeypatch)
    for past in (64, 200, 600):  # of 600, splits would have a second piece behind the end of the cache
        after, logits, _ = decoder.step(weights, cache._replace(length=jnp.int32(past)), jnp.array([1]))
        assert np.isnan(logits).all()
        np.testing.assert_array_equal(after.keys, cache.keys)
        np.testing.assert_array_equal(after.values, cache.values)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_can_be_lowered_for_a_gpu(program_for_a_gpu, dtype):
    """Whether Triton takes it; none is needed. With the sizes of SmolLM2-135M, whose layers are a loop."""
    model = SmolLM2(LlamaConfig(vocab_size=64), dtype=dtype)
    decoder = FusedDecoder(model, 132)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    weights = jax.eval_shape(decoder.prepare, params)
    cache = jax.eval_shape(lambda params: decoder.start(params, jnp.zeros((1, 32), jnp.int32), 3, 512), params)
    program = program_for_a_gpu(decoder.step, weights, cache, jax.ShapeDtypeStruct((1,), jnp.int32))
    assert program.count('name = "layers_kernel"') == 1


@pytest.fixture
def hopper(monkeypatch):
    """Pretends that the default device is a GPU with 132 multiprocessors."""
    card = SimpleNamespace(device_kind="some GPU", platform="gpu", compute_capability="9.0", core_count=132)
    monkeypatch.setattr(jax, "devices", lambda: [card])
    return card


def test_a_gpu_makes_one_text_with_the_kernel_and_several_without(hopper):
    model = SmolLM2(LlamaConfig())
    assert decoder_for(model, texts=1) == FusedDecoder(model, 132)
    assert decoder_for(model, texts=2) == BaseDecoder(model)


def test_a_cpu_makes_texts_without_the_kernel():
    model = SmolLM2(LlamaConfig())
    assert decoder_for(model, texts=1) == BaseDecoder(model)
    assert "is no GPU that runs the kernel" in kernel_obstacle(model)


@pytest.mark.parametrize(
    "changes, dtype, reason",
    [
        ({}, jnp.float32, ""),
        ({}, jnp.bfloat16, ""),
        ({}, jnp.float16, "weights must be float32 or bfloat16, not float16"),
        ({"head_dim": 32}, jnp.float32, "head_dim must be 64"),
        ({"intermediate_size": 1500}, jnp.float32, "multiples of that"),
        ({"hidden_size": 600}, jnp.float32, "multiples of that"),
        ({"num_heads": 64, "num_kv_heads": 64}, jnp.float32, f"{(128 + 80 + 256) * 1024} bytes, does not fit"),
        ({"num_heads": 17, "num_kv_heads": 1}, jnp.float32, f"{(64 + 80 + 128) * 1024} bytes, does not fit"),
        ({"num_heads": 16, "num_kv_heads": 1}, jnp.float32, ""),
        ({"hidden_size": 768, "intermediate_size": 2112}, jnp.float32, f"{(96 + 68 + 48) * 1024} bytes, does not fit"),
        ({"hidden_size": 2048, "intermediate_size": 8192}, jnp.float32, "does not fit into its registers"),
    ],
)
def test_models_that_the_kernel_does_not_compute_have_a_reason(hopper, changes, dtype, reason):
    found = kernel_obstacle(SmolLM2(LlamaConfig(**changes), dtype=dtype))
    assert found == reason if not reason else reason in found


def test_a_smaller_card_has_room_for_half_precision_only(hopper):
    hopper.core_count = 80
    assert "does not fit" in kernel_obstacle(SmolLM2(LlamaConfig()))
    assert kernel_obstacle(SmolLM2(LlamaConfig(), dtype=jnp.bfloat16)) == ""


def test_older_cards_and_a_jax_without_triton_do_without_the_kernel(hopper, monkeypatch):
    model = SmolLM2(LlamaConfig())
    monkeypatch.setattr(fused_decoder, "triton_obstacle", lambda: "no Triton")
    assert kernel_obstacle(model) == "no Triton"
    hopper.compute_capability = "7.5"
    assert "is no GPU that runs the kernel" in kernel_obstacle(model)
    hopper.compute_capability, hopper.core_count = "9.0", None
    assert "is no GPU that runs the kernel" in kernel_obstacle(model)


def test_the_loss_of_the_kernel_is_said(hopper, monkeypatch):
    model = SmolLM2(LlamaConfig())
    assert slow_text_warning(model) == slow_generation_warning(FinetuneConfig()) == ""
    monkeypatch.setattr(fused_decoder, "triton_obstacle", lambda: "this version of JAX has no Triton")
    assert slow_text_warning(model).endswith("and more slowly: this version of JAX has no Triton.")
    assert slow_generation_warning(FinetuneConfig()) == slow_text_warning(model)
    assert slow_text_warning(SmolLM2(LlamaConfig(head_dim=32))) == ""  # a model that never had it
    hopper.compute_capability = "7.5"
    assert slow_text_warning(model) == ""  # a card that never had it


def test_a_text_without_the_kernel_that_could_have_one_comes_with_a_note(tiny_base, monkeypatch):
    base = load_smollm2(tiny_base)
    monkeypatch.setattr("newllm_jax.smollm.generate.slow_text_warning", lambda model: "slow: no Triton")
    with pytest.warns(Note, match="slow: no Triton"):
        list(generate_tokens(base, [1, 2], 1, Sampling(0)))
    with warnings.catch_warnings(action="error"):
        list(generate_tokens(base, [1, 2], 1, Sampling(0), decoder=BaseDecoder(base.model)))  # the caller's choice


def test_texts_are_made_by_the_decoder_for_their_number(tiny_base, monkeypatch):
    base, asked = load_smollm2(tiny_base), []

    def choose(model, texts):
        asked.append(texts)
        return BaseDecoder(model)

    monkeypatch.setattr("newllm_jax.smollm.generate.decoder_for", choose)
    list(generate_tokens(base, [1, 2], 1, Sampling(0)))
    generate_answers(base, ["one", "one"], Batches(1, 0, Sampling(0), 2))
    assert asked == [1, 2]
