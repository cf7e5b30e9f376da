"""Designs of CASCADE: what they are before the first update, which tokens see what, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade.stage.designs import build_design, low_rank_product
from newllm_jax.config import CascadeConfig
from newllm_jax.errors import InputError
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2, take_layers
from tests.cascade.conftest import LLAMA, REENTRY, SKIP

HARD = np.random.default_rng(3).random((3, 12)) < 0.5


def predict(llama, design, trained, hard):
    @jax.jit
    def run(hard):
        decision = design.decide(llama.params, trained, llama.ids)
        return design.logits(llama.params, trained, decision, hard)

    return np.asarray(run(jnp.asarray(hard)))


def base_logits(llama):
    return np.asarray(jax.jit(lambda ids: llama.base.apply({"params": llama.params}, ids)[0])(llama.ids))


@pytest.mark.parametrize("settings", [
    {}, {"weights": "own"}, {"weights": "own", "head": "own"}, {"entry_layer": 4, "weights": "own", "stage_layers": 2},
    {"entry_layer": 4, "stage_layers": 2}, {"entry_layer": 0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("hard", [HARD, np.ones_like(HARD)], ids=["some", "all"])
def test_a_stage_that_starts_as_the_base_is_the_base_bit_for_bit(llama, settings, hard):
    design = llama.design(**{**REENTRY, **settings})
    expected = base_logits(llama)
    assert (predict(llama, design, llama.init(design), hard) == expected).all()
    moved = predict(llama, design, llama.init(design, 0.3), hard)
    assert (moved[~hard] == expected[~hard]).all()
    assert not np.isclose(moved[hard], expected[hard]).all(axis=-1).any()  # every hard token moves


def test_token_stages_see_their_token_alone(llama):
    settings = {**REENTRY, "context": "token"}
    design = llama.design(**settings)
    trained = llama.init(design, 0.3)
    states = llama.base.apply({"params": llama.params}, llama.ids, depths=(1,), method="hidden")
    params = {**design.stage_params(llama.params, trained)}
    alone = design.model.apply({"params": params}, states.at_depths[0, 1, 5][None, None], method="from_hidden")
    expected = design.model.apply({"params": params}, alone.last[0, 0], method="logits")
    found = predict(llama, design, trained, np.ones_like(HARD))
    np.testing.assert_allclose(found[1, 5], expected, rtol=1e-4, atol=1e-4)


def test_hard_tokens_see_the_streams_of_easy_ones(llama):
    """Layer by layer in plain loops, over the streams of all tokens."""
    design = llama.design(**REENTRY)
    trained = llama.init(design, 0.3)
    params = design.stage_params(llama.params, trained)
    base = llama.base.apply({"params": llama.params}, llama.ids, depths=(1, 2, 3, 4), method="hidden").at_depths
    x = base[0]
    for layer in range(3):
        config, part = take_layers(design.model.config, {**params, "embed": llama.params["embed"]}, layer, layer + 1)
        after = SmolLM2(config).apply({"params": part}, x, method="from_hidden").residual
        x = jnp.where(HARD[..., None], after, base[layer + 1])
    scale = params["backbone"]["norm"]["scale"]
    normed = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * scale
    expected = normed @ llama.params["embed"]["embedding"].T
    found = predict(llama, design, trained, HARD)
    np.testing.assert_allclose(found[HARD], expected[HARD], rtol=1e-3, atol=1e-3)
    others = predict(llama, design, trained, np.ones_like(HARD))
    assert not np.allclose(found[HARD], others[HARD], atol=1e-3)  # what the others are matters


def test_a_mixed_prediction_is_the_mean_of_both_distributions(llama):
    replaced, mixed = (llama.design(**{**REENTRY, "prediction": each}) for each in ("replaces", "mixes"))
    trained, hard = llama.init(replaced, 0.3), np.ones_like(HARD)
    stage = jax.nn.softmax(predict(llama, replaced, trained, hard))
    expected = (stage + jax.nn.softmax(base_logits(llama))) / 2
    np.testing.assert_allclose(jax.nn.softmax(predict(llama, mixed, trained, hard)), expected, rtol=1e-4, atol=1e-6)


def test_skipping_leaves_the_layers_out_and_keeps_hard_tokens_whole(llama):
    design = llama.design(**SKIP)
    trained = llama.init(design)
    whole = predict(llama, design, trained, np.ones_like(HARD))
    np.testing.assert_allclose(whole, base_logits(llama), rtol=1e-3, atol=1e-3)
    blocks = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:1], leaf[3:]]), llama.params["backbone"]["blocks"])
    pruned = {**llama.params, "backbone": {**llama.params["backbone"], "blocks": blocks}}
    shallow = SmolLM2(replace(LLAMA, num_layers=2))
    expected, _ = shallow.apply({"params": pruned}, llama.ids)
    found = predict(llama, design, trained, np.zeros_like(HARD))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    routed = predict(llama, design, trained, HARD)
    assert not np.allclose(routed[HARD], base_logits(llama)[HARD], atol=1e-3)  # hard tokens see what easy ones skipped


def test_an_exit_is_a_skip_to_the_end(llama):
    design = llama.design(**{**SKIP, "skipped_layers": (2, 4), "skip_rank": 3})
    trained = llama.init(design)
    stream = llama.base.apply({"params": llama.params}, llama.ids, depths=(2,), method="hidden").at_depths[0]
    normed = (
        stream / jnp.sqrt(jnp.mean(stream**2, -1, keepdims=True) + 1e-5) * llama.params["backbone"]["norm"]["scale"]
    )
    expected = normed @ llama.params["embed"]["embedding"].T
    found = predict(llama, design, trained, np.zeros_like(HARD))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_short_head_is_exact_for_the_first_ids(llama):
    whole = llama.design(**{**SKIP, "short_head": 20, "short_rank": 16})  # of full rank: exact for all
    low = llama.design(**{**SKIP, "short_head": 20, "short_rank": 2})
    plain = predict(llama, llama.design(**SKIP), llama.init(llama.design(**SKIP)), np.zeros_like(HARD))
    np.testing.assert_allclose(
        predict(llama, whole, llama.init(whole), np.zeros_like(HARD)), plain, rtol=1e-3, atol=1e-3
    )
    found = predict(llama, low, llama.init(low), HARD)
    expected = predict(llama, llama.design(**SKIP), llama.init(llama.design(**SKIP)), HARD)
    np.testing.assert_allclose(found[..., :20], expected[..., :20], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[HARD], expected[HARD], rtol=1e-3, atol=1e-3)
    assert not np.allclose(found[~HARD][:, 20:], expected[~HARD][:, 20:], atol=0.1)


def test_a_low_rank_product_is_the_best_for_the_states_there_are():
    random = np.random.default_rng(0)
    table = random.normal(size=(40, 8)).astype(np.float32)
    states = (random.normal(size=(500, 8)) * [9, 5, 3, 1, 0.5, 0.2, 0.1, 0.1]) @ random.normal(size=(8, 8))
    moment = states.T @ states / 500

    def error(product):
        return np.mean((states @ np.asarray(product) - states @ table.T) ** 2)

    found = low_rank_product(jnp.asarray(table), jnp.asarray(moment, jnp.float32), 3)
    left, sizes, right = np.linalg.svd(states @ table.T, full_matrices=False)  # Eckart and Young: no product is better
    best = np.mean(((left[:, :3] * sizes[:3]) @ right[:3] - states @ table.T) ** 2)
    assert error(found["p"] @ found["q"]) == pytest.approx(best, rel=0.02)
    blind = low_rank_product(jnp.asarray(table), jnp.eye(8), 3)
    assert error(blind["p"] @ blind["q"]) > 1.5 * best


def test_costs_count_head_probe_keys_and_values():
    """SmolLM2-135M: a layer is 3,538,944 products, its head as many as 8 of them."""
    sizes = LlamaConfig()
    design = CascadeConfig(**{**REENTRY, "entry_layer": 8})
    costs = build_design(design, SmolLM2(sizes), "fp32").costs(sizes)
    base, layer, keys, probe = 38 * 3538944, 3538944, 2 * 576 * 192, 577 * 64
    assert costs.easy == pytest.approx((base + probe + 22 * keys) / base)
    assert costs.hard == pytest.approx((base + probe + 22 * layer) / base)
    entropy = build_design(design.override({"criterion": "entropy"}), SmolLM2(sizes), "fp32").costs(sizes)
    assert entropy.hard == pytest.approx((base + 22 * layer + 8 * layer) / base)
    skip = CascadeConfig(**{**SKIP, "skipped_layers": (14, 20), "short_head": 8192, "short_rank": 64, "skip_rank": 4})
    costs = build_design(skip, SmolLM2(sizes), "fp32").costs(sizes)
    short = 8192 * 576 + 64 * (576 + 49152 - 8192)
    assert costs.hard == pytest.approx((base + probe) / base)
    assert costs.easy == pytest.approx((base + probe - 6 * (layer - keys) + 2 * 576 * 4 - 8 * layer + short) / base)
    assert costs.hard_share(costs.mean(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize(("settings", "message"), [
    ({**REENTRY, "entry_layer": 5}, "entry_layer: the base has 4 layers, not 5"),
    ({**SKIP, "skipped_layers": (2, 6)}, "skipped_layers: the base has 4 layers, not 6"),
    ({**SKIP, "skipped_layers": (0, 2)}, "skipped_layers: the first must be at least 1"),
    ({**SKIP, "short_head": 61}, "short_head: must be below the 61 ids"),
    ({**SKIP, "skipped_layers": (3, 1)}, "skipped_layers: must be two rising numbers"),
    ({**SKIP, "criterion": "entropy"}, "criterion: must be probe beside skipped_layers"),
    ({**SKIP, "entry_layer": 2}, "entry_layer: must be none beside skipped_layers"),
    ({**REENTRY, "num_stages": 2}, "num_stages: must be 1"),
    ({**REENTRY, "start": "random"}, "weights: must be own where start is random"),
    ({**REENTRY, "entry_layer": None}, "start: must be random where entry_layer is none"),
    ({**REENTRY, "short_head": 3}, "short_head: must be 0 without skipped_layers"),
    ({"criterion": "probe"}, "criterion: must be a score of a single pass"),
    ({"flops": 1.5}, "flops: must be none where a stage has the published design"),
    ({**REENTRY, "entry_layer": 4, "stage_layers": 9}, "stage_layers: the base has 4 layers to start as, not 9"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_settings_that_make_no_design(llama, settings, message):
    with pytest.raises(InputError, match=message):
        llama.design(**settings)
