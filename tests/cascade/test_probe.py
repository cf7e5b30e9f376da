"""A probe learns what hidden states tell about the gain of the hard path, and nothing where they tell nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade import probe as probe_file
from newllm_jax.cascade.probe import init_probe, probe_gains, train_probe
from newllm_jax.cascade.states import States
from newllm_jax.smollm.flops import probe_cost
from newllm_jax.training.step import count_parameters
from tests.cascade.conftest import LLAMA

TOKENS = 40_000


def ranks(values):
    return np.argsort(np.argsort(values))


def rank_correlation(left, right):
    return np.corrcoef(ranks(left), ranks(right))[0, 1]


@pytest.fixture(scope="module")
def planted():
    """Hidden states of all lengths, and gains that are a function of their direction, with noise and wild ones."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(TOKENS, 16)).astype(np.float32)
    direction = hidden / np.sqrt(np.mean(hidden**2, axis=1, keepdims=True))
    truth = np.tanh(2 * direction[:, 0]) + 0.7 * np.maximum(direction[:, 1] - direction[:, 2], 0)
    gains = truth + 0.5 * random.normal(size=TOKENS)
    gains[::100] = 100 * random.choice([-1, 1], TOKENS // 100)
    return hidden * np.exp(random.normal(size=(TOKENS, 1))).astype(np.float32), gains.astype(np.float32), truth


HELD_OUT = slice(TOKENS - 4000, None)


def test_a_probe_learns_a_function_of_the_hidden_state(planted):
    hidden, gains, truth = planted
    probe = train_probe(hidden[: HELD_OUT.start], gains[: HELD_OUT.start], 0)
    found = np.asarray(probe_gains(probe, hidden[HELD_OUT]))
    assert rank_correlation(found, truth[HELD_OUT]) > 0.9
    assert np.mean((found - truth[HELD_OUT]) ** 2) < 0.2 * np.var(truth)  # in nats, not only in order


def test_a_probe_finds_nothing_in_noise(planted):
    hidden, gains, _ = planted
    shuffled = np.random.default_rng(1).permutation(gains)
    found = np.asarray(probe_gains(train_probe(hidden[: HELD_OUT.start], shuffled[: HELD_OUT.start], 0), hidden))
    assert abs(rank_correlation(found[HELD_OUT], shuffled[HELD_OUT])) < 0.05
    assert np.std(found) < 0.2 * np.std(np.clip(gains, -4, 4))
    assert np.mean(found) == pytest.approx(np.mean(np.clip(shuffled, -4, 4)), abs=0.1)


def test_the_same_seed_gives_the_same_probe_bit_for_bit(planted):
    hidden, gains, _ = (each[:2000] for each in planted)
    first, again, other = (train_probe(hidden, gains, seed) for seed in (0, 0, 1))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first, again)
    assert all(jax.tree.leaves(same))
    assert (first["inner"]["kernel"] != other["inner"]["kernel"]).any()


def test_a_probe_learns_the_same_from_a_file_a_block_at_a_time(planted, tmp_path, monkeypatch):
    hidden, gains, _ = (each[:3000] for each in planted)
    whole = train_probe(hidden, gains, 0)
    written = States(16, tmp_path)
    written.append(hidden)
    monkeypatch.setattr(probe_file, "LARGEST_BLOCK", 2 * 512 * 16 * 4)  # two of the five updates of an epoch
    in_blocks = train_probe(written.array(), gains, 0)
    for one, other in zip(*map(jax.tree.leaves, (whole, in_blocks)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert not np.allclose(whole["outer"]["kernel"], train_probe(hidden, gains, 1)["outer"]["kernel"], rtol=1e-5)


def test_a_probe_starts_at_zero_and_costs_its_kernels():
    probe = init_probe(16, 0)
    assert (probe_gains(probe, jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 16)))) == 0).all()
    biases = count_parameters([probe["inner"]["bias"], probe["outer"]["bias"]])
    assert probe_cost(LLAMA) == count_parameters(probe) - biases == 16 * 64 + 64


def test_fewer_tokens_than_a_batch_are_enough(planted):
    hidden, gains, _ = (each[:7] for each in planted)
    assert np.isfinite(np.asarray(probe_gains(train_probe(hidden, gains, 0), hidden))).all()
