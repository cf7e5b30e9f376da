"""The Llama against transformers, from the norm up; its cache, causality, depths and re-entry; the real SmolLM2."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade import hardness
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import (
    Attention,
    Block,
    RMSNorm,
    SmolLM2,
    SwiGLU,
    empty_cache,
    parameter_shapes,
    rotary_embedding,
    rotate,
    take_layers,
)
from newllm_jax.training.step import count_parameters

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture
def rotary(golden):
    return rotary_embedding(jnp.arange(11), golden.config.head_dim, golden.config.rope_theta)


@pytest.fixture(scope="module")
def run(golden):
    """`run(ids or hidden, ..., method=...)` on the golden model, compiled."""
    apply = jax.jit(golden.model.apply, static_argnames=("method", "depths"))
    return lambda *inputs, **options: apply({"params": golden.params}, *inputs, **options)


@pytest.mark.quick
class TestAgainstTransformers:
    def test_norm(self, golden):
        scale = {"params": golden.layer["attention_norm"]}
        normed = RMSNorm(golden.config.rms_norm_eps).apply(scale, golden["residuals"][0])
        np.testing.assert_allclose(normed, golden["norm"], **CLOSE)

    def test_rotary_embedding_and_rotation(self, golden, rotary):
        np.testing.assert_allclose(rotary[0], golden["cosine"], **CLOSE)
        np.testing.assert_allclose(rotary[1], golden["sine"], **CLOSE)
        heads = jnp.asarray(golden["query"]).reshape(2, 11, golden.config.num_heads, golden.config.head_dim)
        np.testing.assert_allclose(rotate(heads, rotary), golden["rotated"], **CLOSE)

    def test_attention(self, golden, rotary):
        attention = Attention(golden.config)
        mask = jnp.tril(jnp.ones((11, 11), bool))
        mixed, cached = attention.apply({"params": golden.layer["attention"]}, golden["norm"], rotary, mask)
        np.testing.assert_allclose(mixed, golden["attention"], **CLOSE)
        assert cached is None

    def test_swiglu(self, golden):
        config, layer = golden.config, golden.layer
        read = golden["residuals"][0] + golden["attention"]
        read = RMSNorm(config.rms_norm_eps).apply({"params": layer["mlp_norm"]}, read)
        np.testing.assert_allclose(SwiGLU(config).apply({"params": layer["mlp"]}, read), golden["mlp"], **CLOSE)

    def test_block(self, golden, rotary):
        mask = jnp.tril(jnp.ones((11, 11), bool))
        after, _ = Block(golden.config).apply({"params": golden.layer}, golden["residuals"][0], rotary, mask)
        np.testing.assert_allclose(after, golden["residuals"][1], **CLOSE)

    def test_model(self, golden, run):
        states = run(golden["ids"], depths=(0, 1, 2, 3), method="hidden")
        np.testing.assert_allclose(states.at_depths, golden["residuals"], rtol=2e-5, atol=5e-5)
        np.testing.assert_allclose(states.last, golden["last"], **CLOSE)
        logits, cache = run(golden["ids"])
        np.testing.assert_allclose(logits, golden["logits"], **CLOSE)
        assert cache is None

    def test_head_of_its_own(self, golden):
        config = dataclasses.replace(golden.config, tie_embeddings=False)
        table = golden.params["embed"]["embedding"]
        params = {**golden.params, "lm_head": {"kernel": -table.T}}
        logits, _ = SmolLM2(config).apply({"params": params}, golden["ids"])
        np.testing.assert_allclose(logits, -golden["logits"], **CLOSE)


class TestHiddenStates:
    def test_names_of_the_residual_stream(self, golden, run):
        states = run(golden["ids"], depths=(0, 2, 3), method="hidden")
        np.testing.assert_array_equal(states.at_depths[0], states.embedding)
        np.testing.assert_array_equal(states.at_depths[2], states.residual)
        np.testing.assert_array_equal(states.embedding, golden["residuals"][0])
        assert run(golden["ids"], method="hidden").at_depths.shape == (0, 2, 11, 24)

    @pytest.mark.parametrize("depths", [(4,), (-1,), (2, 1), (1, 1)])
    def test_depths_that_are_none(self, golden, run, depths):
        with pytest.raises(ValueError, match="rising numbers from 0 to 3"):
            run(golden["ids"], depths=depths, method="hidden")

    @pytest.mark.parametrize("first", [1, 2])
    def test_re_entry_at_a_layer(self, golden, run, first):
        whole = run(golden["ids"], depths=(first,), method="hidden")
        config, params = take_layers(golden.config, golden.params, first, 3)
        again = SmolLM2(config).apply({"params": params}, whole.at_depths[0], method="from_hidden")
        np.testing.assert_allclose(again.last, whole.last, **CLOSE)
        assert config.num_layers == 3 - first
        with pytest.raises(ValueError):
            take_layers(golden.config, golden.params, 1, 4)

    def test_tokens_alone_see_only_themselves(self, golden, run):
        hidden = jnp.asarray(golden["residuals"][0])
        together, alone = run(hidden, method="from_hidden"), run(hidden.reshape(22, 1, 24), method="from_hidden")
        np.testing.assert_allclose(alone.last.reshape(2, 11, 24)[:, 0], together.last[:, 0], **CLOSE)
        assert jnp.abs(alone.last.reshape(2, 11, 24)[:, 1:] - together.last[:, 1:]).max() > 0.1

    @pytest.mark.parametrize("tied", [True, False])
    def test_same_parameters_from_ids_and_from_hidden(self, golden, tied):
        model, key = SmolLM2(dataclasses.replace(golden.config, tie_embeddings=tied)), jax.random.key(0)
        from_ids = jax.eval_shape(model.init, key, jnp.zeros((1, 1), jnp.int32))
        from_hidden = jax.eval_shape(lambda: model.init(key, jnp.zeros((1, 1, 24)), method="from_hidden"))
        assert from_ids == from_hidden
        assert ("lm_head" in from_ids["params"]) is not tied


@pytest.mark.quick
class TestCausality:
    def test_a_later_id_changes_later_outputs_only(self, golden, run):
        ids = jnp.asarray(golden["ids"])
        before, _ = run(ids)
        after, _ = run(ids.at[:, 5].set((ids[:, 5] + 1) % 61))
        np.testing.assert_array_equal(after[:, :5], before[:, :5])
        assert (jnp.abs(after[:, 5:] - before[:, 5:]).max(axis=-1) > 1e-3).all()


@pytest.mark.quick
class TestCache:
    @pytest.mark.parametrize("pieces", [(11,), (4, 7), (6, *[1] * 5)])
    def test_pieces_give_what_the_whole_gives(self, golden, run, pieces):
        cache, outputs, start = empty_cache(golden.config, 2, 13), [], 0
        for size in pieces:
            logits, cache = run(golden["ids"][:, start : start + size], cache)
            outputs.append(logits)
            start += size
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), golden["logits"], **CLOSE)
        assert cache.length == 11

    def test_the_past_matters(self, golden, run):
        _, cache = run(golden["ids"][:, :4], empty_cache(golden.config, 2, 13))
        with_past, _ = run(golden["ids"][:, 4:], cache)
        without, _ = run(golden["ids"][:, 4:], empty_cache(golden.config, 2, 13))
        assert jnp.abs(with_past - without).max() > 0.1

    def test_a_full_cache_gives_nan(self, golden, run):
        _, cache = run(golden["ids"], empty_cache(golden.config, 2, 13))
        too_long, _ = run(golden["ids"][:, :4], cache)
        assert jnp.isnan(too_long).all()
        for _ in range(2):
            fits, cache = run(golden["ids"][:, :1], cache)
            assert jnp.isfinite(fits).all()
        too_long, _ = run(golden["ids"][:, :1], cache)
        assert jnp.isnan(too_long).all()


class TestSizes:
    @pytest.mark.parametrize(
        ("sizes", "parameters"),
        [
            ({}, 134_515_008),
            ({"num_layers": 8}, 56_632_896),  # a stage
            ({"hidden_size": 960, "intermediate_size": 2560, "num_layers": 32, "num_heads": 15, "num_kv_heads": 5},
             361_821_120),
            ({"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 24, "num_heads": 32, "num_kv_heads": 32,
              "rope_theta": 130000.0}, 1_711_376_384),
        ],
        ids=["135M", "stage", "360M", "1.7B"],
    )  # fmt: skip
    def test_parameters(self, sizes, parameters):
        config = LlamaConfig(**sizes)
        assert count_parameters(parameter_shapes(config)) == parameters
        ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
        logits, _ = jax.eval_shape(SmolLM2(config).apply, {"params": parameter_shapes(config)}, ids)
        assert logits.shape == (2, 5, 49152) and logits.dtype == jnp.float32

    def test_initial_weights(self, golden):
        params = jax.jit(golden.model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        for path, leaf in jax.tree.leaves_with_path(params):
            if "norm" in jax.tree_util.keystr(path):
                assert (leaf == 1).all()
            else:
                assert abs(leaf.mean()) < 0.002 and 0.018 < leaf.std() < 0.022

    def test_half_precision_keeps_parameters_and_logits_in_float32(self, golden):
        model = dataclasses.replace(golden.model, dtype=jnp.bfloat16)
        logits, _ = model.apply({"params": golden.params}, golden["ids"])
        assert logits.dtype == jnp.float32
        assert 1e-3 < jnp.abs(logits - golden["logits"]).mean() < 0.2
        stage = jax.eval_shape(lambda: model.apply({"params": golden.params}, golden["norm"], method="from_hidden"))
        assert stage.last.dtype == stage.residual.dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def parity(reference):
    with np.load(reference / "smollm2_q4_parity.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def outputs(smollm2, parity):
    @jax.jit
    def run(params, ids):
        states = smollm2.model.apply({"params": params}, ids, depths=(1,), method="hidden")
        return states, smollm2.model.apply({"params": params}, states.last, method="logits")

    return run(smollm2.params, parity["input_ids"])


class TestRealWeights:
    """The 4-bit SmolLM2 against two chunks that an independent float32 implementation computed."""

    def test_logits(self, parity, outputs):
        np.testing.assert_allclose(outputs[1][:, parity["positions"]], parity["logits"], rtol=0, atol=2e-3)

    def test_hidden_states(self, parity, outputs):
        np.testing.assert_allclose(outputs[0].at_depths[0], parity["hs1"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(outputs[0].last, parity["hs_last"], rtol=0, atol=1e-3)

    def test_loss(self, parity, outputs):
        log_probabilities = jax.nn.log_softmax(outputs[1][:, :-1])
        targets = parity["input_ids"][:, 1:, None]
        loss = -jnp.take_along_axis(log_probabilities, targets, axis=-1)[..., 0]
        np.testing.assert_allclose(loss, parity["loss"][:, :-1], rtol=0, atol=1e-4)

    def test_cosine(self, parity, outputs):
        cosine = hardness.cosine_similarity(outputs[0].embedding, outputs[0].last)
        np.testing.assert_allclose(cosine, parity["cos_sim"], rtol=0, atol=1e-5)

    def test_parameters(self, smollm2):
        assert count_parameters(smollm2.params) == 134_515_008
        assert smollm2.model.config == LlamaConfig()
