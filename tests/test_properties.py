"""Properties that hold for whatever Hypothesis thinks of: each against a definition of its own, written to be plain."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from newllm_jax.cascade import ensemble
from newllm_jax.cascade.extraction import Tokens
from newllm_jax.cascade.hardness import count_hard, hardness_threshold, select_hard, stage_counts
from newllm_jax.cascade.run import chosen_epoch
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.config import CascadeConfig
from newllm_jax.newllm.sequences import cut_stream, windows
from newllm_jax.newllm.tokenizer import BOS, EOS, PAD, SPECIAL_WORDS, UNK, WordTokenizer
from newllm_jax.smollm.alpaca import CHUNK, STRIDE, chunk_rows
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.sources.text import split_by_hash
from newllm_jax.training.history import best_epoch, patience_exhausted
from newllm_jax.training.optimizer import clipping_schedule
from newllm_jax.training.split import batches, epoch_order

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("suite")

STAGE = Stage(LlamaConfig(hidden_size=2, num_heads=1, num_kv_heads=1, head_dim=2))
WORDS = st.text("aAbé,!' \t", max_size=5) | st.sampled_from(["<unk>", "<UNK>", "<PAD>"])
TEXTS = st.lists(st.lists(WORDS, max_size=12).map(" ".join), max_size=12)


# New-LLM's data


@given(
    texts=st.lists(st.lists(st.integers(1, 60_000), min_size=1, max_size=40), min_size=1, max_size=5),
    length=st.integers(3, 12),
    data=st.data(),
)
def test_windows(texts, length, data):
    """Every window is a piece of its text; together they are all of it, but a tail shorter than a stride."""
    stride = data.draw(st.integers(1, length))
    rows = iter([row.tolist() for ids in texts for rows in windows(np.array(ids), length, stride) for row in rows])
    for ids in texts:
        if len(ids) <= length:
            assert next(rows) == ids + [0] * (length - len(ids))
            continue
        start = 0
        while start + length <= len(ids):
            assert next(rows) == ids[start : start + length]
            start += stride
        assert len(ids) - (start - stride + length) < stride
    assert next(rows, None) is None


@given(ids=st.integers(2, 60), rows=st.integers(1, 9), length=st.integers(2, 12))
def test_stream(ids, rows, length):
    """Every id but the first is a target once, after the id before it; the pieces of a row follow each other."""
    stream = np.arange(1, ids + 1, dtype=np.uint16)
    pieces = cut_stream(stream, rows, length).reshape(-1, rows, length)
    targets = pieces[..., 1:][pieces[..., 1:] != PAD]
    assert sorted(targets) == list(range(2, ids + 1))
    followed = pieces[..., 1:] != PAD
    assert (pieces[..., 1:][followed] == pieces[..., :-1][followed] + 1).all()
    assert (pieces[1:, :, 0] == pieces[:-1, :, -1]).all()
    assert (pieces != PAD).any((1, 2)).all()  # no piece is all padding


@given(texts=TEXTS, size=st.integers(5, 12))
def test_vocabulary(texts, size):
    """The most frequent words first, the earlier seen of equals; every other word is unknown."""
    words = [word for text in texts for word in text.lower().split() if word != "<unk>"]
    counts = collections.Counter(words)
    ranked = sorted(counts, key=lambda word: (-counts[word], words.index(word)))[: size - 4]
    tokenizer = WordTokenizer.from_texts(texts, size)
    assert tokenizer.words == (*SPECIAL_WORDS, *ranked)
    for text in texts:
        ids = tokenizer.encode(text)
        read = [word if word in ranked else "<UNK>" for word in text.lower().split()]
        assert (ids[0], ids[-1]) == (BOS, EOS) and tokenizer.decode(ids[1:-1]) == " ".join(read)
        assert ids.count(UNK) == read.count("<UNK>")
        prompt = tokenizer.encode_prompt(text)
        assert prompt[0] == BOS and all(UNK <= index < len(tokenizer) and index != BOS for index in prompt[1:])


@given(rows=st.lists(st.text("abé", max_size=4), max_size=40), splits=st.integers(1, 4))
def test_split_by_hash(rows, splits):
    """Every row once, in order, wherever equal rows are, and whatever stands beside it."""
    names = ["train", "validation", "test", "more"][:splits]
    found = split_by_hash(rows, names)
    assert sorted(row for split in found.values() for row in split) == sorted(rows)
    home = {row: name for name in names for row in found[name]}
    assert all(found[name] == [row for row in rows if home[row] == name] for name in names)
    for row in rows[:5]:
        assert split_by_hash([row], names)[home[row]] == [row]


# Chunks


class Letters:
    """An encoder: every letter is an id."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def rows_of(sizes):
    """Rows of one letter each, so many times."""
    return [{"instruction": chr(97 + index) * size, "input": "", "output": ""} for index, size in enumerate(sizes)]


BORDERS = st.sampled_from([126, 127, 128, 254, 255, 382, 383])  # with two line ends about one, two and three strides
ROWS = st.lists(st.integers(0, 600) | BORDERS, max_size=12).map(rows_of)


@given(rows=ROWS, train=st.integers(1, 8), validation=st.integers(1, 4), whole_rows=st.booleans())
def test_chunks(rows, train, validation, whole_rows):
    """The first chunks train, the next validate; with whole rows no row has chunks in both."""
    every = []
    for owner, row in enumerate(rows):
        ids = [ord(letter) for letter in row["instruction"] + "\n\n"]
        every += [
            (owner, ids[start : start + CHUNK]) for start in range(0, len(ids), STRIDE) if start + CHUNK <= len(ids)
        ]
    start = train
    while whole_rows and 0 < start < len(every) and every[start][0] == every[start - 1][0]:
        start += 1
    if start + validation > len(every) or len(every) < train:
        with pytest.raises(ValueError, match="too few rows"):
            chunk_rows(rows, Letters(), (train, validation), split_rows=not whole_rows)
        return
    found = chunk_rows(rows, Letters(), (train, validation), split_rows=not whole_rows)
    assert found.train.tolist() == [chunk for _, chunk in every[:train]]
    assert found.validation.tolist() == [chunk for _, chunk in every[start : start + validation]]


# Hard tokens

RATIOS = st.floats(0.01, 0.99)


def neighbours(steps):
    """Different float32 values, some of them next to each other."""
    return (np.float32(0.3).view(np.int32) + np.array(steps, np.int32)).view(np.float32)


@given(scores=st.lists(st.integers(0, 90), min_size=1, max_size=60, unique=True).map(neighbours), ratio=RATIOS)
def test_the_share_asked_for_is_hard(scores, ratio):
    chosen = select_hard(scores, hardness_threshold(scores, ratio))
    assert len(chosen) == count_hard(len(scores), ratio) == int((len(scores) - 1) * ratio) + 1
    easy = np.delete(scores, chosen)
    assert chosen.tolist() == sorted(chosen) and (not len(easy) or scores[chosen].max() < easy.min())


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=40), ratio=RATIOS)
def test_ties_are_hard_together(scores, ratio):
    values = np.array(scores, np.float32)
    chosen = select_hard(values, hardness_threshold(values, ratio))
    wanted = count_hard(len(scores), ratio)
    last = np.sort(values)[wanted - 1]
    assert chosen.tolist() == [index for index, score in enumerate(scores) if score <= last]


@given(tokens=st.integers(2, 5000), ratio=RATIOS, stages=st.integers(1, 4))
def test_counts_of_stages_are_those_of_selection(tokens, ratio, stages):
    scores, counts = np.arange(tokens, dtype=np.float32), []
    for _ in range(stages):
        if len(scores) < 2:
            with pytest.raises(ValueError, match="no hard tokens are left"):
                stage_counts(tokens, ratio, stages)
            return
        scores = scores[select_hard(scores, hardness_threshold(scores, ratio))]
        counts.append(len(scores))
    assert stage_counts(tokens, ratio, stages) == counts


# The ensemble


def by_token(scores, thresholds):
    """Where each token exits: it is handed on while its score at the place where it is is at or below the threshold."""
    places = []
    for token in range(scores.shape[1]):
        place = 0
        while place < len(thresholds) and scores[place, token] <= np.float32(thresholds[place]):
            place += 1
        places.append(place)
    return places


@given(tokens=st.integers(1, 30), stages=st.integers(0, 3), data=st.data())
def test_each_token_leaves_the_ensemble_at_one_exit(tokens, stages, data):
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = draw.integers(0, 6, (stages + 1, tokens)).astype(np.float32) / 4
    losses, hits = draw.random((stages + 1, tokens), np.float32), draw.random((stages + 1, tokens)) < 0.5
    thresholds = [float(draw.integers(0, 6) / 4) for _ in range(stages)]
    at = iter(range(1, stages + 1))

    def run_stage(stage, params, seen, criterion, advance):
        """The stage that follows: it knows each token by its hidden state."""
        number, which = next(at), seen.targets
        return Tokens(seen.hidden, which, scores[number][which], losses[number][which], hits[number][which])

    every = np.arange(tokens, dtype=np.int32)
    base = Tokens(np.zeros((tokens, 1), np.float32), every, scores[0], losses[0], hits[0])
    trained = [ensemble.TrainedStage({"w": np.zeros(3)}, threshold) for threshold in thresholds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "run_stage", run_stage)
        rows = ensemble.evaluate_ensemble(base, STAGE, trained, "cosine", 100)
    assert [row["parameters"] for row in rows] == [100 + 3 * count for count in range(stages + 1)]
    for count, row in enumerate(rows):
        places = by_token(scores, thresholds[:count])
        assert [group["tokens"] for group in row["exit_groups"]] == [places.count(place) for place in range(count + 1)]
        assert sum(row["exit_rates"]) == pytest.approx(1)
        assert row["val_loss"] == pytest.approx(np.mean([losses[place, token] for token, place in enumerate(places)]))
        assert row["val_accuracy"] == pytest.approx(np.mean([hits[place, token] for token, place in enumerate(places)]))
        for group in row["exit_groups"]:
            mine = [token for token, place in enumerate(places) if place == group["exit"]]
            assert group["loss"] == (pytest.approx(np.mean(losses[group["exit"], mine])) if mine else None)
            assert group["base_loss"] == (pytest.approx(np.mean(losses[0, mine])) if mine else None)


# Training


@given(
    borders=st.lists(st.integers(1, 40), max_size=4, unique=True).map(sorted),
    steps=st.integers(1, 50),
    updates=st.lists(st.integers(0, 2500), min_size=1, max_size=8),
)
def test_adaptive_clipping(borders, steps, updates):
    norms = [0.5 * 2**index for index in range(len(borders) + 1)]
    schedule = clipping_schedule(norms, borders, steps)
    for update in updates:
        epoch, bound = update // steps, norms[0]
        for border, norm in zip(borders, norms[1:], strict=True):
            bound = norm if epoch >= border else bound
        assert float(schedule(np.int32(update))) == bound


STEPS = st.lists(st.sampled_from([-0.5, -0.25, -0.25, 0, 0.25]), max_size=20)
LOSSES = STEPS.map(lambda steps: [9 + float(loss) for loss in np.cumsum(steps)])


@given(losses=LOSSES, patience=st.integers(1, 5), gain=st.sampled_from([0.0, 0.25, 0.5]))
def test_early_stopping(losses, patience, gain):
    """Some `patience` epochs in a row, none of which is lower by more than the gain than the last epoch that was."""
    gains, best = [], float("inf")
    for epoch, loss in enumerate(losses):
        if best - loss > gain:
            gains.append(epoch)
            best = loss
    ends = [*gains, len(losses)]
    longest = max((after - before - 1 for before, after in itertools.pairwise([-1, *ends])), default=0)
    assert patience_exhausted(losses, patience, gain) is (longest >= patience)


@given(losses=LOSSES.filter(len))
def test_best_and_chosen_epoch(losses):
    history = [{"epoch": number, "val_loss": loss} for number, loss in enumerate(losses, 1)]
    assert best_epoch(history) == 1 + losses.index(min(losses))
    assert chosen_epoch(history, CascadeConfig(stage_weights="best")) == best_epoch(history)
    assert chosen_epoch(history, CascadeConfig(stage_weights="last")) == len(losses)


@given(
    examples=st.integers(0, 60),
    batch_size=st.integers(1, 20),
    more=st.integers(0, 30),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(1, 1000),
)
def test_batches_have_every_example_once(examples, batch_size, more, seed, epoch):
    order = epoch_order(seed, epoch, examples)
    assert order.tolist() == epoch_order(seed, epoch, examples).tolist() and sorted(order) == list(range(examples))
    cutting = batches(order, batch_size, examples + more)
    assert cutting.shape == (-(-(examples + more) // batch_size), batch_size)
    assert [index for index in cutting.ravel() if index >= 0] == order.tolist()
    assert (cutting.ravel()[:examples] >= 0).all()  # the empty places are the last
