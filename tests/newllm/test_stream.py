"""Text as one stream: its counts, the context that pieces hand on, and runs of it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import newllm_jax
from newllm_jax.config import NewLLMConfig, load_config
from newllm_jax.errors import InputError
from newllm_jax.newllm import loss as loss_module
from newllm_jax.newllm.experiment import train_newllm
from newllm_jax.newllm.loss import initial_carry, next_word_loss
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import evaluate_run, init_params
from newllm_jax.newllm.tokenizer import BOS, EOS, PAD, UNK, WordTokenizer
from newllm_jax.newllm.wikitext import EVALUATED_ROWS, SPLITS, load_wikitext, prepare
from newllm_jax.training.loop import evaluate
from newllm_jax.training.split import Split
from newllm_jax.training.step import make_evaluation

pytestmark = pytest.mark.quick

STREAM = {"text": "stream", "lower_case": False, "vocabulary_size": None}


def test_the_standard_benchmark_has_its_published_counts(real_data):
    config = NewLLMConfig(dataset=str(real_data / "datasets" / "wikitext"), sequence_length=71, batch_size=64, **STREAM)
    data = load_wikitext(config)
    assert len(data.tokenizer) - len(["<PAD>", "<BOS>"]) == 33_278
    # Published: 217,646 and 245,569; a blank last line of this copy adds one to each.
    targets = {split: int((data.examples(split, config)[:, 1:] != PAD).sum()) for split in ("validation", "test")}
    assert targets == {"validation": 217_647, "test": 245_570}
    assert data.steps(config) == len(data.examples("train", config)) // 64 == 467
    assert not any(np.isin((PAD, BOS), ids).any() for ids in data.sequences.values())


def test_lines_end_with_eos_and_case_is_kept():
    splits = {split: ["The cat the", "", "<unk> cat"] for split in SPLITS}
    provenance = {"source": "test", "fallback": ""}
    data = prepare(splits, NewLLMConfig(**STREAM), provenance)
    assert data.tokenizer.words[4:] == ("cat", "The", "the")
    assert data.sequences["train"].tolist() == [EOS, 5, 4, 6, EOS, EOS, UNK, 4, EOS]
    assert data.tokenizer.encode("THE the") == [BOS, UNK, 6, EOS]
    lowered = prepare(splits, NewLLMConfig(**STREAM | {"lower_case": True}), provenance)
    assert lowered.tokenizer.words[4:] == ("the", "cat")


def test_evaluation_in_pieces_is_that_of_the_text_whole():
    config = NewLLMConfig(context_dim=12, sequence_length=6, **STREAM)
    model = ContextVectorLM(20, 8, 16, 12, 2, initialization="he", excluded=(PAD, BOS))
    params = init_params(model, 0)
    ids = np.random.default_rng(0).integers(3, 20, 101).astype(np.uint16)
    data = prepare({split: ["a"] for split in SPLITS}, config, {"source": "", "fallback": ""})
    data.sequences["test"] = ids
    found = evaluate(make_evaluation(next_word_loss(model)), params, data.split("test", config), 1)
    rows = np.pad(ids, (0, 12))[np.arange(EVALUATED_ROWS)[:, None] * 7 + np.arange(8)]  # 7 targets each, 100 in all
    logits, _ = model.apply({"params": params}, jnp.asarray(rows[:, :-1], jnp.int32))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None].astype(np.int32), -1)[..., 0]
    expected = float(jnp.mean(losses, where=rows[:, 1:] != PAD))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    forgetful = Split.from_arrays(data.examples("test", config), EVALUATED_ROWS)
    without = evaluate(make_evaluation(next_word_loss(model)), params, forgetful, 1)
    assert abs(without["loss"] - expected) > 1e-4


def test_ids_that_never_follow_have_no_probability_and_no_gradient():
    model = ContextVectorLM(20, 8, 16, 12, 2, initialization="he", excluded=(PAD, BOS))
    params, ids = init_params(model, 0), jnp.asarray(np.random.default_rng(0).integers(3, 20, (2, 7)))
    probabilities = jax.nn.softmax(model.apply({"params": params}, ids)[0])
    assert not probabilities[..., jnp.array([PAD, BOS])].any()
    loss, carry = next_word_loss(model), initial_carry(NewLLMConfig(context_dim=12, **STREAM), 2)
    gradient = jax.jit(jax.grad(lambda params: loss(params, ids, jnp.ones(2, bool), None, carry)[0].loss))
    found = gradient(params)["logits"]
    used = np.delete(np.arange(20), [PAD, BOS])
    for leaf in (found["kernel"].T, found["bias"]):
        assert not leaf[jnp.array([PAD, BOS])].any()
        assert np.asarray(leaf)[used].any()


@pytest.fixture(scope="module")
def config(small):
    return load_config("baseline", small | STREAM | {"batch_size": 4, "num_epochs": 2, "ema_decay": 0.9})


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return train_newllm(config, run_root=tmp_path_factory.mktemp("whole"), narrate=lambda _: None)


def test_a_run_resumes_bit_for_bit(config, whole, tmp_path):
    half = train_newllm(config.override({"num_epochs": 1}), run_root=tmp_path, narrate=lambda _: None)
    resumed = train_newllm(resume=half.run_dir, overrides={"num_epochs": 2}, narrate=lambda _: None)
    losses = [[(epoch["train_loss"], epoch["val_loss"]) for epoch in run.results["epochs"]] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert resumed.results["test"] == whole.results["test"]


def test_a_run_tells_its_counts_and_can_be_evaluated_and_read(whole):
    data = whole.results["data"]
    assert data["train_targets"] == data["train_words"] + data["train_texts"] > data["test_targets"]
    assert data["steps_per_epoch"] == math.ceil(math.ceil(data["train_targets"] / 4) / 15)
    assert data["train_sequences"] == 4 * data["steps_per_epoch"]
    assert evaluate_run(whole.run_dir)["test"]["loss"] == pytest.approx(whole.results["test"]["loss"], rel=1e-5)
    run = newllm_jax.restore(whole.run_dir)
    words = list(newllm_jax.generate(run, max_words=200, seed=1))
    assert len(words) == 200
    assert "\n" in words
    assert not {"<PAD>", "<BOS>", "<EOS>"} & set(words)


def test_special_words_in_a_text_are_unknown():
    tokenizer = WordTokenizer.from_texts(["a <EOS> b <PAD> <unk>"], None, lower_case=False)
    assert tokenizer.words[4:] == ("a", "b")
    assert tokenizer.encode("<EOS> a") == [BOS, UNK, 4, EOS]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2), ("fp16", 3e-3)])
def test_a_loss_in_parts_is_that_of_the_whole(precision, tolerance, monkeypatch, request):
    """Tied, with ids that never follow; 7 steps in 3 parts."""
    if precision != "fp32":
        request.getfixturevalue(f"{precision}_on_a_cpu")
    model = ContextVectorLM(20, 8, 16, 12, 2, initialization="he", excluded=(PAD, BOS), tie_embeddings=True)
    params, ids = init_params(model, 0), jnp.asarray(np.random.default_rng(0).integers(3, 20, (2, 8)))
    found = []
    for most in (2**26, 3 * 2 * 20):
        monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", most)
        loss = next_word_loss(model.clone(precision=precision))

        def mean(params, loss=loss):
            return loss(params, ids, jnp.ones(2, bool), None, None)[0].loss / 14

        found.append(jax.jit(jax.value_and_grad(mean))(params))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert float(jnp.linalg.norm(one - other)) <= tolerance * float(jnp.linalg.norm(one))


def test_a_stream_has_no_micro_batches():
    with pytest.raises(InputError, match="micro_batch: must be none where text is a stream"):
        NewLLMConfig(micro_batch=2, **STREAM)
