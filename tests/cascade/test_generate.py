"""Generation with early exit: the base's own greedy text without stages, the right exits with them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.generate import exit_rule
from newllm_jax.cascade.hardness import token_scores
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.errors import InputError
from newllm_jax.smollm.generate import generate_tokens, prompt_ids, stream_text
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


@pytest.mark.parametrize("length", [1, 33, 40])
def test_without_stages_it_is_the_base(base, length):
    ids = np.random.default_rng(length).integers(0, 256, length).tolist()
    ours = list(generate_tokens(base, ids, 12, GREEDY))
    expected, _ = greedy_by_hand(base, None, (), ids, 12)
    expected = [token for token in expected[length:] if token != base.tokenizer.eos_id]
    assert ours == expected


def test_with_stages(base, stage):
    ids = np.random.default_rng(0).integers(0, 256, 9).tolist()
    params = [jax.tree.map(lambda leaf: 10 * leaf, init_stage(stage, 0, number)) for number in (1, 2)]
    trained = [TrainedStage(params[0], 0.35), TrainedStage(params[1], 0.1)]
    exits = Exits()
    predict = exit_rule(stage, trained, "cosine", exits)
    ours = list(generate_tokens(base, ids, 16, GREEDY, predict=predict))
    expected, depths = greedy_by_hand(base, stage, trained, ids, 16)
    assert ours == [token for token in expected[9:] if token != base.tokenizer.eos_id]
    assert exits.counts == np.bincount(depths, minlength=3).tolist()
    assert min(exits.counts) > 0, exits.counts  # each exit is taken
    assert str(exits) == "base {}, stage 1 {}, stage 2 {}".format(*exits.counts)


@pytest.mark.parametrize(("threshold", "exits_of_all"), [(0.0, [0, 0, 3]), (-1e-30, [3, 0, 0])])
def test_a_score_equal_to_the_threshold_is_handed_on(base, stage, threshold, exits_of_all):
    """A last hidden state of zeros has the score 0 exactly, of the base and of every stage."""
    backbone = base.params["backbone"]
    zeros = {**backbone, "norm": jax.tree.map(np.zeros_like, backbone["norm"])}
    silent = dataclasses.replace(base, params={**base.params, "backbone": zeros})
    trained, exits = [TrainedStage(init_stage(stage, 0, number), threshold) for number in (1, 2)], Exits()
    sampling = Sampling(temperature=1.0, top_p=1.0)
    predict = exit_rule(stage, trained, "cosine", exits)
    ids = list(generate_tokens(silent, [1, 2, 3], 3, sampling, seed=1, predict=predict))
    assert len(ids) == 3
    assert exits.counts == exits_of_all


def test_sampling_follows_its_seed(base):
    ids, sampling = [1, 2, 3], Sampling(temperature=1.0, top_p=1.0)
    one, same, other = (list(generate_tokens(base, ids, 10, sampling, seed=seed)) for seed in (0, 0, 1))
    assert one == same != other


def test_bad_requests(base):
    with pytest.raises(InputError, match="prompt: must be at least one token"):
        list(generate_tokens(base, [], 1, GREEDY))


def test_characters_come_out_whole(base):
    text = "a\N{SNOWMAN}é!"
    ids = base.tokenizer.encode(text)
    assert len(ids) == 7
    assert list(stream_text(base.tokenizer, iter(ids))) == ["a", "\N{SNOWMAN}", "é", "!"]
    assert next(stream_text(base.tokenizer, iter(ids[:3]))) == "a"


def test_a_prompt_is_a_turn_of_a_conversation(base):
    assert prompt_ids(base.tokenizer, "hello") == base.tokenizer.encode("hello")
