"""The ensemble against a token-by-token re-computation, and its two limits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade import extraction
from newllm_jax.cascade.ensemble import TrainedStage, evaluate_ensemble
from newllm_jax.cascade.extraction import Pieces, Tokens, batch_tokens, extract, run_stage
from newllm_jax.cascade.hardness import token_scores
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.errors import Note
from newllm_jax.smollm.pretrained import load_smollm2


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_smollm2(tiny_base)


@pytest.fixture(scope="module")
def stage(base):
    return Stage(stage_config(base.model.config, 1))


@pytest.fixture(scope="module")
def weights(stage):
    """Two stages that say something: ten times the initial weights."""
    return [jax.tree.map(lambda leaf: 10 * leaf, init_stage(stage, 0, number)) for number in (1, 2)]


@pytest.fixture(scope="module")
def chunks():
    return np.random.default_rng(0).integers(0, 257, (11, 129)).astype(np.int32)


@pytest.fixture(scope="module", params=[pytest.param("cosine", marks=pytest.mark.quick), "entropy", "max_probability"])
def criterion(request):
    return request.param


@pytest.fixture(scope="module")
def tokens(base, chunks, criterion) -> Tokens:
    return extract(base.model, base.params, chunks, criterion)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def test_extraction_is_the_base_token_by_token(base, chunks, criterion, tokens):
    assert len(tokens) == 11 * 128
    assert tokens.hidden.dtype == tokens.scores.dtype == tokens.losses.dtype == np.float32

    @jax.jit
    def forward(ids):
        states = base.model.apply({"params": base.params}, ids, method="hidden")
        return states, base.model.apply({"params": base.params}, ids)[0][0]

    for chunk in (0, 10):
        ids = chunks[chunk]
        states, logits = jax.tree.map(np.asarray, forward(ids[None, :-1]))
        rows = slice(chunk * 128, chunk * 128 + 128)
        np.testing.assert_allclose(tokens.hidden[rows], states.last[0], rtol=1e-5, atol=1e-5)
        assert (tokens.targets[rows] == ids[1:]).all()
        losses = [-log_softmax(row)[target] for row, target in zip(logits, ids[1:], strict=True)]
        np.testing.assert_allclose(tokens.losses[rows], losses, rtol=1e-4, atol=1e-4)
        scores = token_scores(criterion, states.embedding[0], states.last[0], logits)
        np.testing.assert_allclose(tokens.scores[rows], scores, rtol=1e-4, atol=1e-5)
        assert (tokens.hits[rows] == (np.argmax(logits, -1) == ids[1:])).all()


def test_pieces_of_the_extraction_keep_their_order(base, chunks, criterion, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "PIECE_BATCHES", 1)
    for _ in range(2):  # computed, then read from the files
        in_pieces = extract(base.model, base.params, chunks, criterion, Pieces(tmp_path, "validation", "0"))
        for field in ("hidden", "targets", "scores", "losses", "hits"):
            np.testing.assert_array_equal(getattr(in_pieces, field), getattr(tokens, field))
        assert isinstance(in_pieces.hidden, np.memmap) and not isinstance(tokens.hidden, np.memmap)
    assert {path.name for path in tmp_path.iterdir()} == {
        "validation.hidden", "validation-000000.arrays", "validation-000008.arrays",  # of 8 chunks and of 3
    }  # fmt: skip


@pytest.mark.quick
def test_tokens_in_files_are_those_in_memory(base, chunks, stage, weights, tmp_path):
    found = []
    for folder in (None, tmp_path):
        tokens = extract(base.model, base.params, chunks, "cosine", folder=folder)
        some = tokens.take(np.arange(3, len(tokens), 2))  # no multiple of what a stage reads at a time
        found.append((tokens, some, run_stage(stage, weights[0], some, "cosine")))
    for in_memory, in_files in zip(*found, strict=True):
        assert isinstance(in_files.hidden, np.memmap) and not isinstance(in_memory.hidden, np.memmap)
        for field in ("hidden", "targets", "scores", "losses", "hits"):
            np.testing.assert_array_equal(getattr(in_files, field), getattr(in_memory, field))
    assert list(tmp_path.iterdir()) == []  # files without a name: whatever ends the process leaves nothing
    assert len(found[1][0].take(np.zeros(0, int)).hidden) == 0


@pytest.mark.quick
def test_only_pieces_of_the_same_are_read(base, chunks, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "PIECE_BATCHES", 1)
    outputs = []

    def counted(*arguments):
        outputs.append(compute(*arguments))
        return outputs[-1]

    compute = extraction._extract_piece
    monkeypatch.setattr(extraction, "_extract_piece", counted)

    def computed(split="train", weights="0", ids=chunks, criterion="cosine"):
        """How many pieces were not read from the files."""
        del outputs[:]
        extract(base.model, base.params, ids, criterion, Pieces(tmp_path, split, weights))
        return len(outputs)

    assert (computed(), computed()) == (2, 0)
    files, others = sorted(tmp_path.glob("*.arrays")), chunks.copy()
    others[:, 0] = (others[:, 0] + 1) % 257  # which is no target
    for change in ({"weights": "1"}, {"ids": others}, {"criterion": "entropy"}):
        with pytest.warns(Note, match="damaged, or of something else; its content is made anew"):
            assert (computed(**change), computed()) == (2, 2)
    assert computed("validation") == 2  # files of its own
    first, second = (file.read_bytes() for file in files)
    damages = [(second, first), (second, second), (first[:-1], second), (first, second[:40] + b"x" + second[41:])]
    for damaged, count in zip(damages, (2, 1, 1, 1), strict=True):
        for file, content in zip(files, damaged, strict=True):
            file.write_bytes(content)
        with pytest.warns(Note, match="its content is made anew"):
            assert computed() == count
        assert [file.read_bytes() for file in files] == [first, second]
    states = tmp_path / "train.hidden"
    whole = states.read_bytes()
    second_begins = 8 * 128 * base.model.config.hidden_size * 4
    changed = bytearray(whole)
    changed[second_begins] ^= 1
    damages = [(b"", 2), (whole[:second_begins], 1), (whole[:-1], 1), (changed, 1), (whole[4:] + whole[:4], 2)]
    for content, count in damages:
        states.write_bytes(content)
        with pytest.warns(Note, match="its content is made anew"):
            assert computed() == count
        assert states.read_bytes() == whole
    states.unlink()
    with pytest.warns(Note, match="its content is made anew"):
        assert (computed(), computed()) == (2, 0)
    validation = tmp_path / files[0].name.replace("train", "validation")
    validation.replace(files[0])
    with pytest.warns(Note, match="its content is made anew"):
        assert computed() == 1


@pytest.mark.quick
@pytest.mark.parametrize("field", ["hidden", "targets", "scores", "losses", "hits"])
def test_a_right_hash_over_what_is_no_piece(base, chunks, tmp_path, field):
    pieces, ids = Pieces(tmp_path, "train", "0"), chunks[:2]
    piece = extract(base.model, base.params, ids, "cosine")
    array = getattr(piece, field)
    for other in (array[:-1], array[:, None], array.astype(np.float16), 1 - array if field == "targets" else array[:0]):
        pieces.write(0, ids, "cosine", dataclasses.replace(piece, **{field: other}))
        with pytest.warns(Note, match="its content is made anew"):
            assert pieces.read(0, ids, "cosine") is None
    pieces.write(0, ids, "cosine", piece)
    found = pieces.read(0, ids, "cosine")
    assert found is not None and (found.hidden == piece.hidden).all()


def by_hand(base_tokens, stage, weights, thresholds, criterion, used):
    """Exit, loss and hit of every token, one after the other."""

    @jax.jit
    def forward(params, hidden):
        last, logits = stage.apply({"params": params}, hidden)
        return last, logits[0], token_scores(criterion, hidden, last, logits)[0]

    results = []
    for index in range(len(base_tokens)):
        hidden, target = jnp.asarray(base_tokens.hidden[index][None]), base_tokens.targets[index]
        score, loss, exit_ = base_tokens.scores[index], base_tokens.losses[index], 0
        hit = base_tokens.hits[index]
        while exit_ < used and score <= np.float32(thresholds[exit_]):
            hidden, logits, score = forward(weights[exit_], hidden)
            loss, exit_ = -log_softmax(logits)[target], exit_ + 1
            hit = np.argmax(logits) == target
        results.append((exit_, loss, hit))
    return np.array(results)


def test_ensemble_token_by_token(tokens, stage, weights, criterion):
    few = tokens.take(np.arange(60))
    predicted = jnp.argmax(stage.apply({"params": weights[0]}, few.hidden)[1], -1)
    targets = np.where(np.arange(60) % 2, predicted, few.targets).astype(np.int32)  # or no stage would hit any
    few = dataclasses.replace(few, targets=targets)
    first = float(np.median(few.scores))
    second = float(np.median(run_stage(stage, weights[0], few.take(few.scores <= first), criterion).scores))
    trained = [TrainedStage(weights[0], first), TrainedStage(weights[1], second)]
    rows = evaluate_ensemble(few, stage, trained, criterion, 1000)
    size = sum(leaf.size for leaf in jax.tree.leaves(weights[0]))
    assert [row["parameters"] for row in rows] == [1000, 1000 + size, 1000 + 2 * size]
    for used, row in enumerate(rows):
        expected = by_hand(few, stage, weights, (first, second), criterion, used)
        counts = np.bincount(expected[:, 0].astype(int), minlength=used + 1)
        assert row["stages"] == used
        assert row["exit_rates"] == pytest.approx(list(counts / 60))
        assert row["val_loss"] == pytest.approx(expected[:, 1].mean(), rel=1e-5)
        assert row["val_ppl"] == pytest.approx(np.exp(expected[:, 1].mean()), rel=1e-4)
        assert row["val_accuracy"] == pytest.approx(expected[:, 2].mean())
        for group in row["exit_groups"]:
            there = expected[:, 0] == group["exit"]
            assert group["tokens"] == there.sum()
            assert group["loss"] == pytest.approx(expected[there, 1].mean(), rel=1e-5)
            assert group["base_loss"] == pytest.approx(few.losses[there].mean(), rel=1e-5)
    assert all(count > 5 for count in counts)  # each exit is taken


def test_a_score_equal_to_the_threshold_is_handed_on(tokens, stage, weights, criterion):
    few = tokens.take(np.arange(60))
    assert len(set(few.scores.tolist())) == 60
    threshold = float(np.sort(few.scores)[29])
    rows = evaluate_ensemble(few, stage, [TrainedStage(weights[0], threshold)], criterion, 1000)
    assert rows[1]["exit_rates"] == [0.5, 0.5]


def test_never_exit_is_the_last_stage_everywhere(tokens, stage, weights, criterion):
    trained = [TrainedStage(entry, np.inf) for entry in weights]
    row = evaluate_ensemble(tokens, stage, trained, criterion, 0)[-1]
    through = run_stage(stage, weights[1], run_stage(stage, weights[0], tokens, criterion), criterion)
    assert row["exit_rates"] == [0, 0, 1]
    assert row["val_loss"] == pytest.approx(through.losses.mean(dtype=np.float64))
    assert row["exit_groups"][0] == {"exit": 0, "tokens": 0, "base_loss": None, "loss": None}


def test_always_exit_is_the_base(tokens, stage, weights, criterion):
    rows = evaluate_ensemble(tokens, stage, [TrainedStage(entry, -np.inf) for entry in weights], criterion, 0)
    assert {row["val_loss"] for row in rows} == {rows[0]["val_loss"]}
    assert rows[-1]["exit_rates"] == [1, 0, 0]


def test_a_stage_reads_tokens_in_batches_of_one_shape(tokens, stage, weights, criterion):
    cut = batch_tokens() + 7
    part, whole = (run_stage(stage, weights[0], tokens.take(np.arange(n)), criterion) for n in (cut, len(tokens)))
    assert len(part) == cut
    assert (part.hidden == whole.hidden[:cut]).all()
    assert (part.scores == whole.scores[:cut]).all()
    assert len(run_stage(stage, weights[0], tokens.take(np.arange(0)), criterion)) == 0
