"""The options of the model that the published one does not have."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm.loss import next_word_loss
from newllm_jax.newllm.model import DROPOUTS, ContextVectorLM
from newllm_jax.newllm.plan import parameter_count
from newllm_jax.newllm.run import init_params
from newllm_jax.training.step import count_parameters

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def strict_promotion():
    """No dtype is widened unless the code says so."""
    with jax.numpy_dtype_promotion("strict"):
        yield


MODEL = ContextVectorLM(
    20, embed_dim=8, hidden_dim=16, context_dim=12, num_layers=3, dropout=0.0, initialization="he"
)  # fmt: skip
TEXT = jnp.asarray(np.random.default_rng(1).integers(4, 20, 11), jnp.int32)
TWICE = jnp.stack([TEXT, TEXT])  # the same text in two places of a batch


def run(model, ids=TWICE, key=0, **options):
    params = init_params(model, 0)
    dropped = {} if key is None else {"deterministic": False, "rngs": {"dropout": jax.random.key(key)}}
    return model.apply({"params": params}, ids, **dropped, **options)


def test_tied_and_residual_equals_its_equations():
    """The whole model in float64 NumPy."""
    model = MODEL.clone(cell="residual", tie_embeddings=True, forget_bias=1.5)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), init_params(model, 0))
    cell, embedding, context = p["cell"], p["embed"]["embedding"], np.zeros(12)
    assert (cell["gates_bias"] == [1.5] * 12 + [0] * 24).all()
    logits, last = run(model, key=None)
    for t, word in enumerate(np.asarray(TEXT)):
        token = embedding[word] @ p["token_in"]["kernel"] + p["token_in"]["bias"]
        h = np.maximum(token + context @ cell["context_in_kernel"], 0)
        for layer in (2, 3):
            x = h / np.sqrt(np.mean(h**2) + 1e-5)
            h = h + np.maximum(x @ cell[f"hidden_{layer}_kernel"] + cell[f"hidden_{layer}_bias"], 0)
        forget, update, delta = np.split(h @ cell["gates_kernel"] + cell["gates_bias"], 3)
        mixed = context / (1 + np.exp(-forget)) + delta / (1 + np.exp(-update))
        context = np.clip((mixed - mixed.mean()) / np.sqrt(mixed.var() + 1e-5), -10, 10)
        expected = h @ p["logits"]["projection"] @ embedding.T + p["logits"]["bias"]
        np.testing.assert_allclose(logits[0, t], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last[0], context, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cell", ["plain", "residual"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_count_of_parameters_is_that_of_the_model(cell, tied):
    config = NewLLMConfig(
        cell=cell, tie_embeddings=tied, embed_dim=8, hidden_dim=16, context_dim=12, num_layers=3
    )  # fmt: skip
    counts = [count_parameters(init_params(ContextVectorLM.from_config(config, words), 0)) for words in (20, 21)]
    assert counts == [parameter_count(config, words) for words in (20, 21)]
    assert counts[1] - counts[0] == 9 + (0 if tied else 16)


def test_he_keeps_the_size_of_a_signal_that_002_loses():
    """From the first of 12 layers to the last: what made the published model wait 16 epochs."""
    sizes = {}
    for initialization in ("normal", "he"):
        model = ContextVectorLM(100, 64, 256, 128, 12, initialization=initialization)
        params = init_params(model, 0)
        ids = jnp.asarray(np.random.default_rng(0).integers(0, 100, (8, 10)), jnp.int32)
        states, _ = model.apply({"params": params}, ids, method="hidden_states")
        first, _ = model.clone(num_layers=1).apply({"params": params}, ids, method="hidden_states")
        sizes[initialization] = float(jnp.std(states) / jnp.std(first))
    assert 0.3 < sizes["he"] < 3
    assert sizes["normal"] < 1e-3


def test_he_draws_by_the_size_of_the_input():
    model = ContextVectorLM(1000, 256, 512, 128, 2, initialization="he")
    params, tied = init_params(model, 0), init_params(model.clone(tie_embeddings=True), 0)
    for leaf, variance in (
        (params["embed"]["embedding"], 1),
        (params["token_in"]["kernel"], 2 / (256 + 128)),
        (params["cell"]["context_in_kernel"], 2 / (256 + 128)),
        (params["cell"]["hidden_2_kernel"], 2 / 512),
        (params["cell"]["gates_kernel"], 1 / 512),
        (params["logits"]["kernel"], 1 / 512),
        (tied["embed"]["embedding"], 1 / 256),
        (tied["logits"]["projection"], 1 / 512),
    ):
        assert float(leaf.std()) == pytest.approx(math.sqrt(variance), rel=0.02)


@pytest.mark.parametrize("name", DROPOUTS)
def test_each_dropout_is_drawn_by_its_key_and_off_in_evaluation(name):
    model = MODEL.clone(**{name: 0.4})
    draws = [run(model, key=key)[0] for key in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()
    assert (draws[0] != run(MODEL, key=0)[0]).any()
    assert (run(model, key=None)[0] == run(MODEL, key=None)[0]).all()


@pytest.mark.parametrize("name", DROPOUTS)
def test_masks_of_an_update_are_shared_by_its_texts_and_others_are_not(name):
    logits, _ = run(MODEL.clone(**{name: 0.4}))
    of_update = name in ("weight_dropout", "word_dropout")
    assert bool((logits[0] == logits[1]).all()) == of_update


def test_all_that_is_fed_in_is_dropped_together_with_a_word():
    """Where the dropped words are read, the model sees the biases only; the others are scaled."""
    model = MODEL.clone(word_dropout=0.5)
    ids = jnp.arange(20)[:, None]  # each word alone, at the first step
    params = init_params(model, 0)
    states, _ = model.apply({"params": params}, ids, deterministic=False, method="hidden_states",
                            rngs={"dropout": jax.random.key(0)})  # fmt: skip
    assert not states[0].any(-1).all()
    doubled = params | {"embed": {"embedding": params["embed"]["embedding"] * 2}}
    kept, _ = model.apply({"params": doubled}, ids, method="hidden_states")
    dropped = ~states[0].any(-1)  # all biases are 0
    assert 4 <= int(dropped.sum()) <= 16
    np.testing.assert_allclose(states[0][~dropped], kept[0][~dropped], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["input_dropout", "output_dropout"])
def test_inputs_and_outputs_have_one_mask_a_text(name):
    """A text of one word again and again: what is dropped of its first step is dropped of all."""
    model = ContextVectorLM(20, 64, 64, 12, 1, dropout=0.0, initialization="he", **{name: 0.5})
    params = init_params(model, 0)
    params["cell"]["context_in_kernel"] *= 0  # so that every step gives the same
    states, _ = model.apply({"params": params}, jnp.full((2, 5), 7), deterministic=False, method="hidden_states",
                            rngs={"dropout": jax.random.key(0)})  # fmt: skip
    assert (states == states[0]).all()
    assert (states[:, 0] != states[:, 1]).any()


def test_a_loss_with_every_option_has_a_gradient_by_every_parameter():
    model = MODEL.clone(cell="residual", tie_embeddings=True, **dict.fromkeys(DROPOUTS, 0.2))
    loss, params = next_word_loss(model), init_params(model, 0)

    def total(params):
        return loss(params, TWICE, jnp.ones(2, bool), jax.random.key(1), None)[0].loss

    found = jax.jit(jax.grad(total))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert float(jnp.abs(leaf).max()) > 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize("settings", [{"cell": "deep"}, {"initialization": "zero"}, {"word_dropout": 1.0}], ids=str)
def test_attributes_that_no_model_can_have_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        init_params(MODEL.clone(**settings), 0)
    with pytest.raises(InputError, match=next(iter(settings))):
        NewLLMConfig(**settings)
