"""Generation with early exit: the base's own greedy text without stages, the right exits with them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.generate import CascadeDecoder, cascade_params
from newllm_jax.cascade.hardness import token_scores
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.loop import generated_tokens
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.smollm.generate import generate_tokens
from newllm_jax.smollm.pretrained import load_smollm2

pytestmark = pytest.mark.quick

GREEDY = Sampling(temperature=0, top_p=1)


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_smollm2(tiny_base)


@pytest.fixture(scope="module")
def stage(base):
    return Stage(stage_config(base.model.config, 1))


def greedy_by_hand(base, stage, trained, ids, count):
    """Without a cache: the whole text again for every token."""
    ids, exits = list(ids), []

    @jax.jit
    def read(padded, last):  # what stands after a token does not change it
        states = base.model.apply({"params": base.params}, padded, method="hidden")
        hidden = states.last[:, last]
        logits = base.model.apply({"params": base.params}, hidden, method="logits")
        return hidden, logits, token_scores("cosine", states.embedding[:, last], hidden, logits)[0]

    @jax.jit
    def hand_on(params, hidden):
        last, logits = stage.apply({"params": params}, hidden)
        return last, logits, token_scores("cosine", hidden, last, logits)[0]

    for _ in range(count):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        (hidden, logits, score), depth = read(padded, len(ids) - 1), 0
        while depth < len(trained) and score <= np.float32(trained[depth].threshold):
            hidden, logits, score = hand_on(trained[depth].params, hidden)
            depth += 1
        ids.append(int(jnp.argmax(logits)))
        exits.append(depth)
        if ids[-1] == base.tokenizer.eos_id:
            break
    return ids, exits


@pytest.fixture(scope="module")
def trained(stage):
    """Two stages with weights and thresholds such that each exit is taken."""
    params = [jax.tree.map(lambda leaf: 10 * leaf, init_stage(stage, 0, number)) for number in (1, 2)]
    return [TrainedStage(params[0], 0.35), TrainedStage(params[1], 0.1)]


def cascade_tokens(base, stage, trained, ids, count, sampling=GREEDY, seed=0):
    """The tokens after a prompt, and where they exited."""
    decoder, exits = CascadeDecoder(base.model, stage, len(trained), "cosine"), Exits()
    params = cascade_params(base.params, trained)
    tokens = generate_tokens(base, ids, count, sampling, seed, decoder=decoder, params=params, exits=exits)
    return list(tokens), exits


def test_never_exiting_is_the_whole_model(base, stage, trained):
    """No stage that a token could exit at, or none that a token reaches: the text is the base's own."""
    ids = np.random.default_rng(0).integers(0, 256, 9).tolist()
    expected = list(generate_tokens(base, ids, 12, GREEDY))
    unreached = [dataclasses.replace(each, threshold=-2.0) for each in trained]
    for stages in ([], unreached):
        ours, exits = cascade_tokens(base, stage, stages, ids, 12)
        assert ours == expected
        assert exits.counts == [len(expected) + (len(expected) < 12), *[0] * len(stages)]


def test_all_the_way_is_the_last_stage(base, stage, trained):
    always = [dataclasses.replace(each, threshold=2.0) for each in trained]
    ids = np.random.default_rng(0).integers(0, 256, 9).tolist()
    ours, exits = cascade_tokens(base, stage, always, ids, 12)
    expected, depths = greedy_by_hand(base, stage, always, ids, 12)
    assert ours == [token for token in expected[9:] if token != base.tokenizer.eos_id]
    assert exits.counts == [0, 0, len(depths)]


def test_with_stages(base, stage, trained):
    ids = np.random.default_rng(0).integers(0, 256, 9).tolist()
    ours, exits = cascade_tokens(base, stage, trained, ids, 16)
    expected, depths = greedy_by_hand(base, stage, trained, ids, 16)
    assert ours == [token for token in expected[9:] if token != base.tokenizer.eos_id]
    assert exits.counts == np.bincount(depths, minlength=3).tolist()
    assert min(exits.counts) > 0, exits.counts  # each exit is taken
    assert str(exits) == "base {}, stage 1 {}, stage 2 {}".format(*exits.counts)


def test_a_token_that_exits_reaches_no_later_stage(base, stage, trained):
    """Although its score is below a later stage's threshold."""
    widening = [trained[0], dataclasses.replace(trained[1], threshold=0.9)]
    ids = np.random.default_rng(0).integers(0, 256, 9).tolist()
    ours, exits = cascade_tokens(base, stage, widening, ids, 16)
    expected, depths = greedy_by_hand(base, stage, widening, ids, 16)
    assert ours == [token for token in expected[9:] if token != base.tokenizer.eos_id]
    assert exits.counts == np.bincount(depths, minlength=3).tolist()
    assert exits.counts[0] > 0 and exits.counts[2] > 0


def test_texts_at_once_exit_each_for_itself(base, stage, trained):
    decoder, params = CascadeDecoder(base.model, stage, 2, "cosine"), cascade_params(base.params, trained)
    prompts = np.random.default_rng(0).integers(0, 256, (3, 9))

    def texts(prompts):
        keys = jax.random.split(jax.random.key(0), len(prompts))
        pieces = list(generated_tokens(decoder, params, prompts, 16, 256, GREEDY, keys, per_call=8))
        return [np.concatenate([piece[part] for piece in pieces], axis=1) for part in (0, 1)]

    together = texts(prompts)
    alone = [texts(prompts[row : row + 1]) for row in range(3)]
    for part in (0, 1):
        np.testing.assert_array_equal(together[part], np.concatenate([each[part] for each in alone]))
    steps = together[1].T
    assert any(len(set(step)) > 1 for step in steps.tolist())  # of one step's tokens, some go further than others


def test_a_stage_is_computed_only_for_tokens_that_reach_it(base, stage, trained):
    """Weights that are no numbers spoil nothing where no token is handed on."""
    spoilt = [jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), each.params) for each in trained]
    ids, never = [1, 2, 3], [TrainedStage(params, -2.0) for params in spoilt]
    assert cascade_tokens(base, stage, never, ids, 6)[0] == list(generate_tokens(base, ids, 6, GREEDY))
    decoder = CascadeDecoder(base.model, stage, 2, "cosine")
    params = jax.eval_shape(lambda: cascade_params(base.params, trained))
    shapes = jax.eval_shape(decoder.prepare, params)
    cache = jax.eval_shape(lambda: decoder.start(cascade_params(base.params, trained), jnp.zeros((1, 32), int), 3, 64))
    program = str(jax.make_jaxpr(decoder.step)(shapes, cache, jax.ShapeDtypeStruct((1,), jnp.int32)))
    assert program.count("cond[") == 2


@pytest.mark.parametrize(("threshold", "exits_of_all"), [(0.0, [0, 0, 3]), (-1e-30, [3, 0, 0])])
def test_a_score_equal_to_the_threshold_is_handed_on(base, stage, threshold, exits_of_all):
    """A last hidden state of zeros has the score 0 exactly, of the base and of every stage."""
    backbone = base.params["backbone"]
    zeros = {**backbone, "norm": jax.tree.map(np.zeros_like, backbone["norm"])}
    silent = dataclasses.replace(base, params={**base.params, "backbone": zeros})
    trained = [TrainedStage(init_stage(stage, 0, number), threshold) for number in (1, 2)]
    sampling = Sampling(temperature=1.0, top_p=1.0)
    ids, exits = cascade_tokens(silent, stage, trained, [1, 2, 3], 3, sampling, seed=1)
    assert len(ids) == 3
    assert exits.counts == exits_of_all
