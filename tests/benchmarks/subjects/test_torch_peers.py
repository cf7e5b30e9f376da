"""The PyTorch peers learn, count what New-LLM counts, see no future, and carry their state and averages as it does."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.subjects.peer_config import PeerConfig
from newllm_jax.newllm.sequences import cut_stream
from newllm_jax.training.average import Average
from newllm_jax.training.optimizer import learning_rate_schedule

torch = pytest.importorskip("torch", reason="PyTorch is an extra: pip install -e '.[benchmarks]'")
from benchmarks.subjects import torch_peers as subject  # noqa: E402
from benchmarks.subjects.torch_training import device  # noqa: E402

torch.set_num_threads(1)  # threads that wait for each other take longer than these models
VOCABULARY = 20
LSTM = {"layers": 2, "hidden": 16, "embed": 8, "batch_size": 4, "learning_rate": 0.02, "warmup_steps": 2, "epochs": 3}
GPT = {**LSTM, "kind": "gpt", "embed": 16, "heads": 2}
DROPOUTS = ("word_dropout", "input_dropout", "between_dropout", "output_dropout", "weight_dropout")
KINDS = [
    LSTM, LSTM | dict.fromkeys(DROPOUTS, 0.1) | {"tie": True, "ema_decay": 0.9, "weight_decay": 0.1}, GPT,
    GPT | dict.fromkeys(("input_dropout", "residual_dropout", "attention_dropout"), 0.1) | {"tie": True},
]  # fmt: skip


def windows(examples=18, length=9):
    """Rising ids, which are easy to predict; every third text is short."""
    starts = np.random.default_rng(0).integers(4, VOCABULARY, (examples, 1))
    ids = (4 + (starts + np.arange(length)) % (VOCABULARY - 4)).astype(np.uint16)
    ids[::3, 5:] = 0
    return subject.PeerData(dict.fromkeys(("train", "validation", "test"), ids), None, VOCABULARY)


def stream(length=6, rows=4):
    """Rising ids as one stream."""
    ids = (4 + np.arange(100) % (VOCABULARY - 4)).astype(np.uint16)
    examples = cut_stream(ids, rows, length)
    splits = ("train", "validation", "test")
    return subject.PeerData(dict.fromkeys(splits, examples), dict.fromkeys(splits, rows), VOCABULARY)


def model(settings, data):
    torch.manual_seed(0)
    return subject.peer_model(PeerConfig(**settings), data).to(device()).eval()


def on_device(ids):
    return torch.from_numpy(ids.astype(np.int64)).to(device())


@pytest.mark.parametrize("settings", KINDS)
def test_a_peer_learns(settings):
    row = subject.train_peer(PeerConfig(**{**settings, "epochs": 25}), windows(), test=True)
    losses = [entry["val_loss"] for entry in row["epochs"]]
    assert losses[-1] < losses[0] - 0.3
    assert row["best"]["val_loss"] == min(losses) == losses[row["best"]["epoch"] - 1]
    assert row["test"]["loss"] == pytest.approx(row["best"]["val_loss"])  # the same texts, with the best weights
    assert row["updates_per_epoch"] == 5  # the last one is of two texts


def test_a_peer_of_a_stream_learns_and_is_the_same_again():
    config = PeerConfig(**{**KINDS[1], "epochs": 25})
    one, other = (subject.train_peer(config, stream()) for _ in range(2))
    assert one["epochs"][-1]["val_loss"] < one["epochs"][0]["val_loss"] - 0.3
    if device() == "cpu":
        assert [entry["val_loss"] for entry in one["epochs"]] == [entry["val_loss"] for entry in other["epochs"]]


@pytest.mark.parametrize("settings", [LSTM, GPT])
def test_padding_and_absent_texts_are_not_counted(settings):
    data = windows()
    peer, ids = model(settings, data), on_device(data.examples["train"][:4])
    logits, _ = peer(ids[:, :-1], peer.start(4))
    _, count = subject.peer_loss(peer, logits, ids[:, 1:])
    assert int(count) == np.count_nonzero(data.examples["train"][:4, 1:])
    found = subject.evaluate(peer, data, "validation")
    more = np.concatenate([data.examples["validation"], np.zeros((3, 9), np.uint16)])
    assert subject.evaluate(peer, subject.PeerData({"validation": more}, None, VOCABULARY), "validation") == (
        pytest.approx(found, rel=1e-5)
    )
    training = subject.PeerTraining(PeerConfig(**settings), data)
    training.model.train()
    training.run(5)
    assert int(training.count) == np.count_nonzero(data.examples["train"][:, 1:])


@pytest.mark.parametrize("settings", [LSTM, GPT])
def test_a_peer_sees_no_future(settings):
    data = windows()
    peer, ids = model(settings, data), on_device(data.examples["train"][1:2, :-1])
    other = ids.clone()
    other[0, 5] = 4 + (other[0, 5] - 3) % (VOCABULARY - 4)
    one, two = (peer(each, peer.start(1))[0].detach().squeeze() for each in (ids, other))
    torch.testing.assert_close(one[:5], two[:5])
    assert not torch.allclose(one[5:], two[5:])


def test_the_state_is_carried_over_pieces():
    short, long = stream(length=6), stream(length=26)
    peer = model(KINDS[1], short)
    assert short.examples["train"].shape[0] > long.examples["train"].shape[0] == 4
    assert subject.evaluate(peer, short, "test") == pytest.approx(subject.evaluate(peer, long, "test"), rel=1e-5)
    apart = subject.PeerData(short.examples, None, VOCABULARY)  # each piece without what is before it
    assert subject.evaluate(peer, apart, "test") != pytest.approx(subject.evaluate(peer, long, "test"), rel=1e-5)


def test_training_carries_the_state_and_starts_an_epoch_from_zero():
    training = subject.PeerTraining(PeerConfig(**LSTM), stream())
    training.epoch(1)
    assert all(float(each.abs().sum()) > 0 for each in training.state)
    seen = []
    training.model.register_forward_pre_hook(lambda _, given: seen.append(float(given[1][0].abs().sum())))
    training.epoch(2)
    assert seen[0] == 0 and all(value > 0 for value in seen[1:])


def test_padding_and_beginnings_cannot_follow_in_a_stream():
    data = stream()
    peer = model(LSTM, data)
    logits, _ = peer(on_device(data.examples["train"][:4, :-1]), peer.start(4))
    logits = logits.detach()
    assert float(logits[..., [0, 2]].max()) < -1e8 < -100 < float(logits[..., [1, 3]].min())


def test_averages_are_those_of_the_library():
    training = subject.PeerTraining(PeerConfig(**LSTM, ema_decay=0.15), windows())
    weight, found = training.trained[1], training.averages[1]
    expected = Average.start(jnp.asarray(weight.detach().cpu().numpy()))
    training.model.train()
    for _ in range(5):
        training.update()
        expected = expected.update(jnp.asarray(weight.detach().cpu().numpy()), 0.15)
        np.testing.assert_allclose(found.cpu().numpy(), expected.params, rtol=1e-6, atol=1e-7)
    assert not np.allclose(found.cpu().numpy(), weight.detach().cpu().numpy(), rtol=1e-4)


@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rates_are_those_of_the_library(warmup):
    expected = learning_rate_schedule("cosine", 0.01, warmup, 40)
    found = subject.learning_rates(PeerConfig(learning_rate=0.01, warmup_steps=warmup), 40)
    np.testing.assert_allclose(found, [expected(number) for number in range(40)], rtol=1e-4, atol=1e-9)


def test_dropped_weights_are_those_between_hidden_states():
    data, inputs = windows(), on_device(windows().examples["train"][:4, :-1])
    for share, same in ((0.0, True), (0.5, False)):
        peer = model(LSTM | {"weight_dropout": share}, data).train()
        (one, _), (two, _) = (peer(inputs, peer.start(4)) for _ in range(2))
        assert torch.equal(one[0], two[0])  # the first step has no hidden state before it
        assert torch.equal(one[1:], two[1:]) is same
        assert torch.equal(peer(inputs, peer.start(4))[0], two) is same
