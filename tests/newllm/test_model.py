"""ContextVectorLM: published sizes, causality both ways, texts fed in pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.config import load_config
from newllm_jax.newllm.loss import next_word_loss
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import init_params
from newllm_jax.training.precision import PRECISIONS

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def strict_promotion():
    """No dtype is widened unless the code says so."""
    with jax.numpy_dtype_promotion("strict"):
        yield


MODEL = ContextVectorLM(vocabulary_size=20, embed_dim=8, hidden_dim=16, context_dim=12, num_layers=3)


@pytest.fixture(scope="module")
def params():
    """Weights large enough for every input to reach every output."""
    return jax.tree.map(lambda leaf: leaf * 15 if leaf.ndim == 2 else leaf, init_params(MODEL, 0))


@pytest.fixture(scope="module")
def ids():
    return jnp.asarray(np.random.default_rng(1).integers(0, 20, (4, 11)), jnp.int32)


def run(params, ids, context=None, model=MODEL, **options):
    return model.apply({"params": params}, ids, context, **options)


@pytest.mark.parametrize(
    ("name", "parameters"), [("baseline", 2_739_432), ("advanced", 4_840_936), ("ctx1024", 5_892_072)]
)
def test_published_parameter_counts(name, parameters):
    model = ContextVectorLM.from_config(load_config(name), 1000)
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_initialisation_is_normal_002_with_zero_biases():
    params = init_params(ContextVectorLM.from_config(load_config("baseline"), 1000), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "bias" in name:
            assert not leaf.any(), name
        elif "norm_scale" in name:
            assert (leaf == 1).all(), name
        else:
            assert float(leaf.std()) == pytest.approx(0.02, rel=0.02), name
            assert abs(float(leaf.mean())) < 3e-4, name


def test_equals_the_report_from_ids_to_logits(params, ids):
    """Independent of the package's recurrence: the whole model in float64 NumPy."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    cell = p["cell"]
    logits, last = run(params, ids)
    for text, expected_logits, expected_last in zip(np.asarray(ids), logits, last, strict=True):
        context = np.zeros(12)
        for t, word in enumerate(text):
            token = p["embed"]["embedding"][word] @ p["token_in"]["kernel"] + p["token_in"]["bias"]
            h = np.maximum(token + context @ cell["context_in_kernel"], 0)
            for layer in (2, 3):
                h = np.maximum(h @ cell[f"hidden_{layer}_kernel"] + cell[f"hidden_{layer}_bias"], 0)
            forget, update, delta = np.split(h @ cell["gates_kernel"] + cell["gates_bias"], 3)
            mixed = context / (1 + np.exp(-forget)) + delta / (1 + np.exp(-update))
            context = np.clip((mixed - mixed.mean()) / np.sqrt(mixed.var() + 1e-5), -10, 10)
            out = h @ p["logits"]["kernel"] + p["logits"]["bias"]
            np.testing.assert_allclose(expected_logits[t], out, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(expected_last, context, rtol=1e-4, atol=1e-4)


def test_earlier_outputs_do_not_see_later_words_and_later_ones_do(params, ids):
    changed = ids.at[0, 5].set((ids[0, 5] + 1) % 20)
    before, after = np.asarray(run(params, ids)[0]), np.asarray(run(params, changed)[0])
    assert (before[0, :5] == after[0, :5]).all()
    assert (before[1:] == after[1:]).all()
    assert all((before[0, t] != after[0, t]).any() for t in range(5, 11))


def test_a_text_in_pieces_equals_the_text_whole(params, ids):
    whole, last = run(params, ids)
    first, context = run(params, ids[:, :4])
    second, last_in_pieces = run(params, ids[:, 4:], context)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(last_in_pieces, last, rtol=1e-6, atol=1e-6)
    forgotten = run(params, ids[:, 4:])[0]
    assert float(jnp.abs(forgotten - second).max()) > 1e-3


def test_dropout_is_drawn_anew_for_every_step_and_layer_and_off_in_evaluation(params, ids):
    draws = [run(params, ids, deterministic=False, rngs={"dropout": jax.random.key(seed)})[0] for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()
    assert (run(params, ids)[0] == run(params, ids, model=MODEL.clone(dropout=0.0))[0]).all()


def test_many_ids_read_a_table_of_the_words_few_do_not(params, ids):
    text = jnp.tile(ids[:1], (1, -(-MODEL.vocabulary_size // ids.shape[1])))
    assert text.size >= MODEL.vocabulary_size > 1
    whole, context = run(params, text)[0], None
    for place in range(text.shape[1]):
        logits, context = run(params, text[:, place : place + 1], context)
        np.testing.assert_allclose(logits[:, 0], whole[:, place], atol=1e-5)


def test_the_loss_counts_words_not_padding(params):
    loss = next_word_loss(MODEL)
    ids = jnp.array([[2, 5, 7, 3, 0, 0], [2, 6, 8, 9, 4, 3]])
    sums, _ = loss(params, ids, jnp.array([True, True]), None, None)
    assert int(sums.count) == 3 + 5
    logits = np.asarray(run(params, ids[:, :-1])[0], np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.asarray(ids[:, 1:])
    counted = targets != 0
    picked = np.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
    assert float(sums.loss) == pytest.approx(-(picked * counted).sum(), rel=1e-5)
    assert int(sums.hits) == ((logits.argmax(-1) == targets) & counted).sum()
    absent, _ = loss(params, ids, jnp.array([True, False]), None, None)
    assert int(absent.count) == 3
    assert float(absent.loss) < float(sums.loss)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_product_is_in_the_precision_asked_for(params, ids, products, name):
    loss = next_word_loss(MODEL.clone(precision=name))
    present, key = jnp.ones(len(ids), bool), jax.random.key(0)
    found = products(jax.grad(lambda params: loss(params, ids, present, key, None)[0].loss), params)
    forward = 1 + MODEL.num_layers + 1 + 1  # of the token, of each layer, of the gates, of the logits
    assert found == [name] * (3 * forward)  # and of each the gradients by both factors
