"""The measures of the layers are those of the model's equations; the training beside them is the library's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.subjects.signal import layer_measures, measure
from newllm_jax import load_config
from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import init_params
from newllm_jax.newllm.wikitext import load_wikitext

VOCABULARY, TEXTS, STEPS, LAYERS, HIDDEN = 7, 3, 4, 3, 5
DELTA = 1e-5


def small_model(cell):
    return ContextVectorLM(VOCABULARY, 3, HIDDEN, 4, LAYERS, cell=cell, initialization="he")


def normed(x, epsilon=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def written_out(params, ids, residual, probes):
    """The equations of README.md in NumPy and float64: the mean loss, and what each layer hands on `[T, L, B, H]`.

    `probes` are added to the latter.
    """
    cell, context, total, count, states = params["cell"], np.zeros((TEXTS, 4)), 0.0, 0, []
    for time in range(STEPS):
        embedded = params["embed"]["embedding"][ids[:, time]]
        kernel = np.concatenate([params["token_in"]["kernel"], cell["context_in_kernel"]])
        h = np.maximum(np.concatenate([embedded, context], 1) @ kernel + params["token_in"]["bias"], 0)
        h = h + probes[time, 0]
        handed_on = [h]
        for number in range(2, LAYERS + 1):
            x = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) if residual else h
            result = np.maximum(x @ cell[f"hidden_{number}_kernel"] + cell[f"hidden_{number}_bias"], 0)
            h = (h + result if residual else result) + probes[time, number - 1]
            handed_on.append(h)
        forget, update, delta = np.split(h @ cell["gates_kernel"] + cell["gates_bias"], 3, -1)
        mixed = context / (1 + np.exp(-forget)) + delta / (1 + np.exp(-update))
        context = np.clip(normed(mixed) * cell["norm_scale"] + cell["norm_bias"], -10, 10)
        logits = h @ params["logits"]["kernel"] + params["logits"]["bias"]
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(TEXTS), ids[:, time + 1]]
        total += losses[ids[:, time + 1] != 0].sum()
        count += (ids[:, time + 1] != 0).sum()
        states.append(handed_on)
    return total / count, np.array(states)


def differences(function, array):
    """The gradient of a function of nothing with respect to an array that it reads, by central differences."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        before, ends = array[index], []
        for sign in (1, -1):
            array[index] = before + sign * DELTA
            ends.append(function())
        array[index] = before
        gradient[index] = (ends[0] - ends[1]) / (2 * DELTA)
    return gradient


@pytest.mark.parametrize("cell", ["plain", "residual"])
def test_measures_are_those_of_the_equations_by_finite_differences(cell):
    model = small_model(cell)
    params = init_params(model, 0)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (TEXTS, STEPS + 1))
    ids[1, 3:] = 0  # a short text
    found = jax.device_get(layer_measures(model, params, jnp.asarray(ids)))

    params = jax.tree.map(lambda leaf: np.array(leaf, np.float64), params)
    probes = np.zeros((STEPS, LAYERS, TEXTS, HIDDEN))

    def loss():
        return written_out(params, ids, cell == "residual", probes)[0]

    states = written_out(params, ids, cell == "residual", probes)[1]
    counted = ids[:, 1:].T != 0
    gradient = differences(loss, probes)
    for layer in range(LAYERS):
        here = states[:, layer][counted]  # [targets, H]
        assert np.isclose(found["rms"][layer], np.sqrt((here**2).mean()), rtol=1e-4)
        assert np.isclose(found["signal"][layer], np.sqrt(here.var(0).mean()), rtol=1e-4)
        expected = np.sqrt((gradient[:, layer][counted] ** 2).mean())
        assert expected > 1e-3 and np.isclose(found["gradient"][layer], expected, rtol=1e-3)
        kernels = [params["cell"][f"hidden_{layer + 1}_kernel"]] if layer else []
        kernels = kernels or [params["token_in"]["kernel"], params["cell"]["context_in_kernel"]]
        norm = np.sqrt(sum((differences(loss, kernel) ** 2).sum() for kernel in kernels))
        assert np.isclose(found["kernel_gradient"][layer], norm, rtol=1e-3)


def test_a_constant_is_no_signal():
    model = small_model("plain")
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params["cell"]["hidden_2_bias"] = jnp.full(HIDDEN, 2.0)
    found = layer_measures(model, params, jnp.ones((TEXTS, STEPS + 1), jnp.int32))
    np.testing.assert_allclose(found["rms"], [0, 2, 0])
    np.testing.assert_allclose(found["signal"], [0, 0, 0])


def test_the_training_is_that_of_the_library(small, small_run):
    from newllm_jax.records.directory import RunDir

    config = load_config("baseline", small)
    found = measure({"config": config.to_dict(), "epochs": 2, "texts": 8})
    history = RunDir.open(small_run).read_json("results.json")["epochs"]
    assert [entry["epoch"] for entry in found["epochs"]] == [0, 1, 2]
    assert [entry["val_ppl"] for entry in found["epochs"][1:]] == [entry["val_ppl"] for entry in history]
    assert all(len(entry["signal"]) == 2 for entry in found["epochs"])

    # Before the first update: the measures of the initial weights on texts spread over the validation split.
    texts = load_wikitext(config).sequences["validation"]
    chosen = texts[np.linspace(0, len(texts) - 1, min(8, len(texts))).round().astype(int)]
    vocabulary = len(load_wikitext(config).tokenizer)
    model = ContextVectorLM.from_config(NewLLMConfig.from_dict(config.to_dict()), vocabulary)
    expected = layer_measures(model, init_params(model, config.seed), jnp.asarray(chosen, jnp.int32))
    for name, values in expected.items():
        np.testing.assert_allclose(found["epochs"][0][name], values, rtol=1e-4)
