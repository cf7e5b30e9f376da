"""What is trained and what is frozen: a division of all parameters, which starts as the base and moves in part only."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.errors import InputError
from newllm_jax.finetuning.adaptation import choose_adaptation
from newllm_jax.finetuning.loss import adapted_loss
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.smollm.pretrained import load_smollm2
from newllm_jax.training.step import count_parameters

pytestmark = pytest.mark.quick
KINDS = {
    "all": {},
    "last": {"trained_layers": 3},
    "every layer": {"trained_layers": 4},
    "lora": {"adapter": "lora"},
    "lora on the last": {"adapter": "lora", "trained_layers": 1},
    "pruned": {"dropped_layers": [1, 2]},
    "pruned, last": {"dropped_layers": [0, 2], "trained_layers": 1},
    "pruned, lora": {"dropped_layers": [2, 4], "adapter": "lora"},
}


@pytest.fixture(scope="module")
def base(deep_base):
    return load_smollm2(deep_base)


@pytest.fixture(params=KINDS)
def divided(request, deep, base):
    """An adaptation, the parameters of its model, and their two trees."""
    adaptation = choose_adaptation(deep.override(KINDS[request.param]), base.model.config)
    params = adaptation.prune(base.params)
    return adaptation, params, adaptation.freeze(params), adaptation.start(params, 0)


def equal(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))
    )


IDS = np.random.default_rng(0).integers(0, 257, (2, 20))


def test_the_two_trees_are_the_model_bit_by_bit(divided):
    adaptation, params, frozen, trained = divided
    assert equal(adaptation.merge(frozen, trained), jax.tree.map(jnp.asarray, params))
    assert adaptation.sizes() == (count_parameters(frozen), count_parameters(trained))
    if not adaptation.rank:
        assert sum(adaptation.sizes()) == count_parameters(params)


def test_a_start_equals_the_model_and_what_is_trained_moves_it(divided):
    adaptation, params, frozen, trained = divided
    logits_of = jax.jit(partial(adaptation.logits, "fp32"))
    whole_model = jax.jit(lambda params: SmolLM2(adaptation.llama).apply({"params": params}, IDS)[0])
    start, expected = logits_of(frozen, trained, IDS), whole_model(params)
    if adaptation.first == 0:
        np.testing.assert_array_equal(start, expected)
    else:  # two programs for one, so up to rounding
        np.testing.assert_allclose(start, expected, rtol=1e-5, atol=1e-5)
    draw = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * draw.standard_normal(leaf.shape, np.float32), trained)
    logits, merged = logits_of(frozen, moved, IDS), adaptation.merge(frozen, moved)
    np.testing.assert_allclose(logits, whole_model(merged), rtol=1e-5, atol=1e-5)
    assert np.abs(logits - start).max() > 1e-2
    changed = {
        jax.tree_util.keystr(path)
        for (path, one), other in zip(jax.tree.leaves_with_path(merged), jax.tree.leaves(params), strict=True)
        if (np.asarray(one)[: adaptation.first] != np.asarray(other)[: adaptation.first]).any()
    }
    assert not any("blocks" in path for path in changed)
    assert adaptation.first == 0 or changed <= {"['backbone']['norm']['scale']"}


def test_which_parameters_are_trained(deep, base):
    def trained(kind):
        adaptation = choose_adaptation(deep.override(KINDS[kind]), base.model.config)
        return adaptation.results()

    layer, norm, embedding = 1952, 16, 257 * 16
    assert base.model.config.num_layers == 4
    assert trained("all") == {"layers": 4, "parameters": 11_936, "trained_parameters": 11_936}
    assert 4 * layer + norm + embedding == 11_936
    assert trained("last") == {"layers": 4, "parameters": 11_936, "trained_parameters": 3 * layer + norm}
    assert trained("every layer")["trained_parameters"] == 4 * layer + norm
    adapters = 3 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24))  # rank times input and output of each kernel
    assert trained("lora") == {"layers": 4, "parameters": 11_936, "trained_parameters": 4 * adapters}
    assert trained("lora on the last")["trained_parameters"] == adapters
    assert trained("pruned") == dict.fromkeys(("parameters", "trained_parameters"), 11_936 - layer) | {"layers": 3}
    assert trained("pruned, lora") == {
        "layers": 2, "parameters": 11_936 - 2 * layer, "trained_parameters": 2 * adapters,
    }  # fmt: skip


def test_pruning_leaves_out_the_layers_between(deep, base):
    adaptation = choose_adaptation(deep.override({"dropped_layers": [1, 3]}), base.model.config)
    pruned, blocks = adaptation.prune(base.params), base.params["backbone"]["blocks"]
    for kept, of_base in zip(jax.tree.leaves(pruned["backbone"]["blocks"]), jax.tree.leaves(blocks), strict=True):
        np.testing.assert_array_equal(kept, of_base[[0, 3]])
    assert equal(pruned["embed"], base.params["embed"])


def test_layers_below_have_no_gradient(deep, base, products):
    ids, present = jnp.zeros((2, 129), jnp.int32), jnp.ones(2, bool)

    def count(kind):
        adaptation = choose_adaptation(deep.override(KINDS[kind]), base.model.config)
        frozen, trained = adaptation.freeze(base.params), adaptation.start(base.params, 0)
        loss = adapted_loss(adaptation, "tf32")(frozen)
        found = products(jax.grad(lambda params: loss(params, ids, present, None, None)[0].loss), trained)
        assert set(found) == ({"tf32", "fp32"} if adaptation.rank else {"tf32"})  # adapters are merged in float32
        return found.count("tf32")

    layer, head = 7 + 2, 1  # products of a layer, however many there are of it, and of the head
    assert count("all") == 3 * (layer + head)
    assert count("last") == layer + 3 * layer + 2 * head
    assert count("lora on the last") == count("last")


def test_seeds_draw_other_adapters(deep, base):
    adaptation = choose_adaptation(deep.override({"adapter": "lora"}), base.model.config)
    draws = [adaptation.start(base.params, seed)["mlp"]["up_proj"]["a"] for seed in (0, 0, 1)]
    assert equal(draws[0], draws[1]) and not equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained_layers": 31}, "trained_layers: must be at most 30, the layers of the model, or none, not 31"),
        ({"trained_layers": 25, "dropped_layers": [14, 20]}, "trained_layers: must be at most 24, the layers of the"),
        ({"dropped_layers": [29, 31]}, r"dropped_layers: must be within the 30 layers of the base, not \(29, 31\)"),
        ({"dropped_layers": [0, 30]}, r"dropped_layers: must be fewer than the 30 layers of the base, not \(0, 30\)"),
    ],
)
def test_layers_that_a_base_has_not(deep, settings, message):
    with pytest.raises(InputError, match=message):
        choose_adaptation(deep.override(settings), LlamaConfig())
