"""Text of a SmolLM2 by the compiled loop: what a plain loop that reads the whole text again for every token gives."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.config import FinetuneConfig
from newllm_jax.decoding.batches import Batches
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.loop import NO_EXIT, generated_tokens, padded_length
from newllm_jax.decoding.sampling import Sampling, choose, narrow
from newllm_jax.errors import InputError
from newllm_jax.finetuning.run import FinetuneRun
from newllm_jax.records.directory import RunDir
from newllm_jax.smollm import decoder as decoder_file
from newllm_jax.smollm.decoder import BaseDecoder
from newllm_jax.smollm.generate import (
    cache_capacity,
    generate_answers,
    generate_tokens,
    in_precision,
    prompt_ids,
    stream_text,
)
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.smollm.pretrained import load_smollm2

pytestmark = pytest.mark.quick

GREEDY = Sampling(temperature=0, top_p=1)
LONGEST = 320  # of the texts that the plain loop reads


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 256), (256, 256), (257, 512)])
def test_a_cache_has_whole_pieces(tokens, capacity):
    assert cache_capacity(tokens) == capacity


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_smollm2(tiny_base)


@pytest.fixture(scope="module")
def logits_after(base):
    """Logits `[V]` after a text, read whole and without a cache; what stands after a token does not change it."""
    read = jax.jit(lambda ids: base.model.apply({"params": base.params}, ids)[0])

    def logits(ids):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(ids)] = ids
        return read(padded)[0, len(ids) - 1]

    return logits


def plain_text(logits_after, ids, count, sampling=GREEDY, seed=0, end=None):
    """The tokens after `ids` by the rule itself: one at a time, each drawn with the key of its position."""
    text = list(ids)
    for position in range(count):
        key = jax.random.fold_in(jax.random.key(seed), position)
        text.append(int(choose(narrow(logits_after(text), sampling), sampling, key)))
        if text[-1] == end:
            break
    return text[len(ids) :]


def random_ids(length, seed=0, vocabulary=256):
    return np.random.default_rng(seed).integers(0, vocabulary, length).tolist()


def without_an_end(base):
    """The base with a tokenizer that knows no end of a text."""
    tokenizer = load_smollm2(str(base.source.path)).tokenizer
    tokenizer.eos_id = None
    return dataclasses.replace(base, tokenizer=tokenizer)


def first_rows(pieces):
    """The first text's ids of all pieces."""
    return np.concatenate([ids[0] for ids, _ in pieces]).tolist()


@pytest.mark.parametrize("length", [1, 2, 32, 33, 34, 40, 65, 256, 257, 258, 300])
def test_greedy_text_is_that_of_the_plain_loop(base, logits_after, length):
    """Around the borders of padding and of the pieces in which a prompt is read."""
    ids = random_ids(length, length)
    assert list(generate_tokens(without_an_end(base), ids, 6, GREEDY)) == plain_text(logits_after, ids, 6)


def test_golden_model(golden):
    """More query heads than key heads, sizes that differ, a norm's epsilon that is seen; several tokens a call."""
    model, ids = SmolLM2(golden.config), golden["ids"]
    read = jax.jit(lambda text: model.apply({"params": golden.params}, text)[0])
    text = np.concatenate([ids, np.zeros((2, 7), int)], axis=1)
    for length in range(11, 18):
        text[:, length] = np.argmax(read(text)[:, length - 1], axis=-1)
    keys = jax.random.split(jax.random.key(0), 2)
    pieces = list(generated_tokens(BaseDecoder(model), golden.params, ids, 7, 64, GREEDY, keys, per_call=3))
    assert [piece.shape for piece, _ in pieces] == [(2, 3), (2, 3), (2, 1)]
    np.testing.assert_array_equal(np.concatenate([piece for piece, _ in pieces], axis=1), text[:, 11:])
    assert all((exits == 0).all() for _, exits in pieces)


def test_head_of_its_own(golden):
    table = golden.params["embed"]["embedding"]
    config = dataclasses.replace(golden.config, tie_embeddings=False)
    decoder, keys = BaseDecoder(SmolLM2(config)), jax.random.key(0)[None]
    texts = {}
    for sign in (1, -1):
        params = {**golden.params, "lm_head": {"kernel": sign * table.T}}
        texts[sign] = first_rows(generated_tokens(decoder, params, golden["ids"][:1], 5, 64, GREEDY, keys))
    tied = BaseDecoder(SmolLM2(golden.config))
    expected = first_rows(generated_tokens(tied, golden.params, golden["ids"][:1], 5, 64, GREEDY, keys))
    assert texts[1] == expected != texts[-1]


@pytest.mark.usefixtures("bf16_on_a_cpu")
def test_half_precision(golden):
    """A model that computes in bfloat16 does so here too: parameters, cache and activations."""
    model, ids = SmolLM2(golden.config, dtype=jnp.bfloat16), golden["ids"]
    decoder = BaseDecoder(model)
    cache = jax.jit(decoder.start, static_argnums=3)(golden.params, ids, jnp.int32(11), 64)
    weights = decoder.prepare(golden.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache.layers)} == {"bfloat16"}
    assert weights.layers[0].gate_up.dtype == weights.embedding.dtype == jnp.bfloat16
    _, logits, _ = jax.jit(decoder.step)(weights, cache, jnp.asarray([5, 6]))
    whole, _ = jax.jit(model.apply)({"params": golden.params}, np.concatenate([ids, [[5], [6]]], axis=1))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, whole[:, -1], rtol=0.05, atol=0.3)


@pytest.mark.parametrize("sampling", [Sampling(1.0, 0, 1.0), Sampling(0.8, 0, 0.95), Sampling(1.3, 5, 0.9)])
def test_sampled_text_is_that_of_the_plain_loop(base, logits_after, sampling):
    ids, base = random_ids(9), without_an_end(base)
    texts = [list(generate_tokens(base, ids, 20, sampling, seed)) for seed in (0, 3)]
    assert texts == [plain_text(logits_after, ids, 20, sampling, seed) for seed in (0, 3)]
    assert texts[0] != texts[1]


def test_greedy_needs_no_narrowing(base):
    ids = random_ids(9)
    wide, narrowed = (list(generate_tokens(base, ids, 8, Sampling(0, *how))) for how in ((0, 1), (3, 0.5)))
    assert wide == narrowed


def test_tokens_do_not_depend_on_how_many_a_call_makes(base):
    ids, keys, sampling = np.asarray([random_ids(9)]), jax.random.key(0)[None], Sampling(1.0)
    texts = [
        first_rows(generated_tokens(BaseDecoder(base.model), base.params, ids, 11, 256, sampling, keys, None, size))
        for size in (1, 4)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 11


@pytest.mark.parametrize("per_call", [1, 4])
def test_a_text_stops_at_its_end(base, logits_after, per_call):
    ids, sampling = random_ids(5, 1), Sampling(1.0)
    whole = plain_text(logits_after, ids, 16, sampling)
    end = whole[6]  # a token that comes up
    stop = whole.index(end)
    decoder, keys = BaseDecoder(base.model), jax.random.key(0)[None]
    pieces = list(generated_tokens(decoder, base.params, np.asarray([ids]), 16, 256, sampling, keys, end, per_call))
    made, exits = (np.concatenate([each[part][0] for each in pieces]) for part in (0, 1))
    assert made.tolist()[: stop + 1] == whole[: stop + 1] and len(made) < 16
    assert (made[stop:] == end).all() and (exits[stop + 1 :] == NO_EXIT).all() and (exits[: stop + 1] == 0).all()


def test_the_end_of_a_turn_is_not_part_of_the_text(base, logits_after):
    ids, sampling, exits = random_ids(5, 1), Sampling(1.0), Exits()
    whole, ending = plain_text(logits_after, ids, 16, sampling), without_an_end(base)
    ending.tokenizer.eos_id = whole[6]
    stop = whole.index(whole[6])
    assert list(generate_tokens(ending, ids, 16, sampling, exits=exits)) == whole[:stop]
    assert exits.counts == [stop + 1]  # of the end, too


def test_three_texts_at_once(base):
    """Each text has its own key and its own end; one goes on while the others have ended."""
    prompts, sampling = np.asarray([random_ids(7, seed) for seed in range(3)]), Sampling(1.0)
    keys, decoder = jax.random.split(jax.random.key(4), 3), BaseDecoder(base.model)

    def texts(rows, end=None):
        made = generated_tokens(decoder, base.params, prompts[rows], 12, 256, sampling, keys[rows], end, 4)
        return np.concatenate([ids for ids, _ in made], axis=1)

    together = texts(np.arange(3))
    for row in range(3):
        np.testing.assert_array_equal(together[row], texts(np.asarray([row]))[0])
    assert len({tuple(row) for row in together.tolist()}) == 3
    end = together[0, 2]
    for row, made in enumerate(texts(np.arange(3), end).tolist()):
        expected = together[row].tolist()
        stop = expected.index(end) if end in expected else len(expected)
        assert made[: stop + 1] == expected[: len(made)][: stop + 1]
        assert set(made[stop:]) <= {end}


def test_what_does_not_fit_is_refused(base):
    decoder, keys = BaseDecoder(base.model), jax.random.key(0)[None]
    with pytest.raises(InputError, match="prompt: must be at least one token"):
        list(generate_tokens(base, [], 1, GREEDY))
    with pytest.raises(InputError, match="max_words: must be with the 2 tokens of the prompt at most 8192"):
        list(generate_tokens(base, [1, 2], 8191, GREEDY))
    with pytest.raises(ValueError, match="60 tokens and 5 more do not fit into a cache for 64"):
        list(generated_tokens(decoder, base.params, np.zeros((1, 60), int), 5, 64, GREEDY, keys))
    assert list(generate_tokens(base, [1], 0, GREEDY)) == []


def test_a_token_past_the_cache_is_not_a_number(golden):
    decoder = BaseDecoder(SmolLM2(golden.config))
    start, step = jax.jit(decoder.start, static_argnums=3), jax.jit(decoder.step)
    cache, weights = start(golden.params, golden["ids"], jnp.int32(11), 12), decoder.prepare(golden.params)
    cache, fits, _ = step(weights, cache, jnp.asarray([1, 2]))
    _, past, _ = step(weights, cache, jnp.asarray([1, 2]))
    assert np.isfinite(fits).all() and np.isnan(past).all()


def test_padding_is_not_seen(golden):
    """Neither what pads a prompt nor how long the padding is changes what follows, bit for bit."""
    decoder = BaseDecoder(SmolLM2(golden.config))
    start, step = jax.jit(decoder.start, static_argnums=3), jax.jit(decoder.step)
    weights = decoder.prepare(golden.params)

    def logits(padding):
        ids = np.concatenate([golden["ids"], np.asarray(padding)], axis=1)
        cache = start(golden.params, ids, jnp.int32(11), 48)
        return step(weights, cache, jnp.asarray([1, 2]))[1]

    zeros, others = logits(np.zeros((2, 21), int)), logits(np.reshape(random_ids(42, 2, 61), (2, 21)))
    np.testing.assert_array_equal(zeros, others)
    np.testing.assert_allclose(zeros, logits(np.zeros((2, 0), int)), rtol=2e-5, atol=2e-5)


def test_a_long_prompt_is_read_in_pieces(golden, monkeypatch):
    decoder, ids = BaseDecoder(SmolLM2(golden.config)), np.reshape(random_ids(64, 5, 61), (2, 32))

    def caches():
        return jax.tree.leaves(jax.jit(lambda params: decoder.start(params, ids, jnp.int32(30), 40))(golden.params))

    whole = caches()
    monkeypatch.setattr(decoder_file, "PROMPT_PIECE", 8)
    for ours, expected in zip(caches(), whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


def test_padded_lengths():
    lengths = (0, 1, 32, 33, 64, 65, 256, 257, 511, 600)
    assert [padded_length(each, 768) for each in lengths] == [32, 32, 32, 64, 64, 128, 256, 512, 512, 768]
    assert padded_length(5, 20) == 20


def test_characters_come_out_whole(base):
    text = "a\N{SNOWMAN}é!"
    ids = base.tokenizer.encode(text)
    assert len(ids) == 7
    assert list(stream_text(base.tokenizer, iter(ids))) == ["a", "\N{SNOWMAN}", "é", "!"]
    assert next(stream_text(base.tokenizer, iter(ids[:3]))) == "a"


def test_a_prompt_is_a_turn_of_a_conversation(base):
    assert prompt_ids(base.tokenizer, "hello") == base.tokenizer.encode("hello")


def test_many_prompts_are_answered_as_each_by_itself(base):
    prompts, sampling = ["a", "bc", "d", "efghi", "j"], Sampling(1.0)
    found = generate_answers(base, prompts, Batches(12, 3, sampling, 2))
    for number, prompt in enumerate(prompts):
        tokens = generate_tokens(base, prompt_ids(base.tokenizer, prompt), 12, sampling, 3 + number)
        assert found[number] == "".join(stream_text(base.tokenizer, tokens))
    assert len({*found}) == 5


@pytest.mark.parametrize(("precision", "kind"), [("bf16", jnp.bfloat16), ("fp16", jnp.float16), ("fp32", jnp.float32)])
@pytest.mark.usefixtures("bf16_on_a_cpu")
def test_half_precision_holds_weights_and_caches_in_it(base, tmp_path, precision, kind):
    def read(model):
        """The weights, the cache after a prompt, and the logits after one more token."""
        decoder = BaseDecoder(model)
        weights = decoder.prepare(base.params)
        cache = decoder.start(base.params, jnp.array([random_ids(5)]), jnp.int32(5), 8)
        return weights, cache, np.asarray(decoder.step(weights, cache, jnp.array([3]))[1])

    run = FinetuneRun(base, FinetuneConfig(), 1, RunDir(tmp_path, {}))
    weights, cache, logits = read(in_precision(run, precision).base.model)
    _, _, exact = read(base.model)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(kind)}
    assert weights.embedding.dtype == weights.layers[0].gate_up.dtype == kind
    error = float(jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact))
    assert logits.dtype == jnp.float32 and (error == 0 if precision == "fp32" else 0 < error < 0.03)
