"""Generation: sampling against its definitions, and text that equals the model fed whole."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.decoding.sampling import Sampling, narrow
from newllm_jax.errors import InputError
from newllm_jax.generation import generate, generate_all
from newllm_jax.newllm.generate import ContextDecoder
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import NewLLMRun, init_params
from newllm_jax.newllm.tokenizer import BOS, EOS, PAD, UNK, WordTokenizer

pytestmark = pytest.mark.quick

WORDS = [f"w{index}" for index in range(16)]
MODEL = ContextVectorLM(vocabulary_size=20, embed_dim=8, hidden_dim=16, context_dim=12, num_layers=2)


@pytest.fixture(scope="module")
def run() -> NewLLMRun:
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim == 2 else leaf, init_params(MODEL, 0))
    params["logits"]["bias"] = params["logits"]["bias"].at[EOS].set(-50.0)  # texts that do not end
    return NewLLMRun(MODEL, params, NewLLMConfig(), WordTokenizer(("<PAD>", "<UNK>", "<BOS>", "<EOS>", *WORDS)), 1, "")


@pytest.mark.parametrize("length", [0, 5, 31, 32, 33, 131])  # prompts are padded to powers of two
def test_greedy_text_is_the_arg_max_of_the_whole_text(run, length):
    prompt = " ".join(WORDS[index % 7] for index in range(length))
    words = list(generate(run, prompt, max_words=8, sampling=Sampling(temperature=0)))
    ids = run.tokenizer.encode(" ".join([prompt, *words]))[:-1]
    padded = np.zeros((1, 160), np.int32)  # what stands after a word does not change it
    padded[0, : len(ids)] = ids
    logits = np.array(jax.jit(run.model.apply)({"params": run.params}, padded)[0][0])
    logits[:, [PAD, UNK, BOS]] = -np.inf
    expected = logits.argmax(-1)[length : length + 8]
    assert words == [run.tokenizer.words[index] for index in expected]


def test_the_prompt_and_the_seed_matter_and_the_same_seed_repeats(run):
    def sample(prompt, seed):
        return list(generate(run, prompt, max_words=20, seed=seed, sampling=Sampling(1.0)))

    assert sample("w1", 0) == sample("w1", 0)
    assert sample("w1", 0) != sample("w1", 1)
    assert sample("w1", 0) != sample("w2 w5", 0)


def test_text_is_streamed(run):
    endless = generate(run, max_words=10**9)
    assert len(list(itertools.islice(endless, 5))) == 5


def test_text_ends_where_the_model_ends_it(run):
    params = dict(run.params, logits={**run.params["logits"], "bias": jnp.zeros(20).at[EOS].set(100.0)})
    ended = NewLLMRun(MODEL, params, run.config, run.tokenizer, 1, "")
    assert list(generate(ended, "w1", sampling=Sampling(1.0))) == []


class Fixed:
    """A model that says the same after every word."""

    def __init__(self, logits):
        self.logits = logits

    def apply(self, variables, ids, context):
        return self.logits[None, None], context


def restrict(logits, sampling):
    """What is left of logits `[V]` after New-LLM's own words and those that sampling excludes."""
    _, allowed, exits = ContextDecoder(Fixed(logits), sampling.unknown).step({}, jnp.zeros((1, 3)), jnp.array([4]))
    assert exits.tolist() == [0]
    return narrow(allowed[0], sampling)


def test_restricted_logits_by_hand():
    probabilities = np.array([0.3, 0.1, 0.1, 0.05, 0.2, 0.15, 0.1])  # PAD, UNK, BOS, EOS and three words
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))

    def kept(**options):
        return np.flatnonzero(np.isfinite(restrict(logits, Sampling(**{"temperature": 1.0, "top_p": 1.0, **options}))))

    assert kept().tolist() == [3, 4, 5, 6]
    assert kept(unknown=True).tolist() == [1, 3, 4, 5, 6]
    assert kept(top_k=2).tolist() == [4, 5]
    assert kept(top_k=99).tolist() == [3, 4, 5, 6]
    assert kept(top_p=0.39).tolist() == [4]  # of what is left, 0.4, 0.3, 0.2, 0.1
    assert kept(top_p=0.41).tolist() == [4, 5]
    assert kept(top_p=0.95).tolist() == [3, 4, 5, 6]
    assert kept(top_p=1e-9).tolist() == [4]
    assert kept(top_k=3, top_p=0.41).tolist() == [4, 5]
    sharper = restrict(logits, Sampling(temperature=0.5, top_p=1.0))
    assert float(sharper[4] - sharper[5]) == pytest.approx(2 * np.log(0.2 / 0.15), rel=1e-4)


def test_samples_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.25, 0.25, 0.2, 0.05, 0.15, 0.1]))
    restricted = restrict(logits, Sampling(1.0, top_p=1.0))
    draws = np.asarray(jax.random.categorical(jax.random.key(0), restricted, shape=(20_000,)))
    shares = np.bincount(draws, minlength=6) / 20_000
    np.testing.assert_allclose(shares, [0, 0, 0, 1 / 6, 1 / 2, 1 / 3], atol=0.012)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_bad_sampling_is_named(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Sampling(**options)


def test_bad_lengths_and_seeds_are_named_at_once(run):
    with pytest.raises(InputError, match="prompt: must be of at most 1000000 letters"):
        generate(run, "a" * 1_000_001)
    with pytest.raises(InputError, match="max_words"):
        generate(run, max_words=-1)
    with pytest.raises(InputError, match="seed"):
        generate(run, seed=-1)


def test_many_prompts_give_the_texts_of_each():
    ended = jnp.zeros(20).at[EOS].set(1.0)
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim == 2 else leaf, init_params(MODEL, 0))
    words = WordTokenizer(("<PAD>", "<UNK>", "<BOS>", "<EOS>", *WORDS))
    ending = NewLLMRun(MODEL, {**params, "logits": {**params["logits"], "bias": ended}}, NewLLMConfig(), words, 1, "")
    prompts = ["w1 w2", "", "w3", "w5 w1", "w4 w4 w4", "w2 w2"]
    whole = [" ".join(generate(ending, prompt, max_words=24, seed=7 + number)) for number, prompt in enumerate(prompts)]
    assert generate_all(ending, prompts, max_words=24, seed=7) == whole
    assert generate_all(ending, prompts, max_words=24, seed=7, batch=1) == whole
    lengths = {len(text.split()) for text in whole}
    assert len(lengths) > 1 and min(lengths) < 24  # some have ended, at different places


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 10**6}, {"precision": "fp8"}, {"max_words": -1}])
def test_bad_arguments_for_many_are_named(run, options):
    with pytest.raises(InputError, match=next(iter(options))):
        generate_all(run, ["w1"], **options)
