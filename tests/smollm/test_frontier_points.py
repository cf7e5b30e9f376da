"""Points of quality against compute: the interval of a known case, losses beside a plain computation, speed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.smollm import generation_speed as speed
from newllm_jax.smollm.decoder import BaseDecoder
from newllm_jax.smollm.frontier_points import bootstrap, model_losses, point


def test_the_interval_is_that_of_the_normal_approximation():
    losses = np.random.default_rng(3).gamma(4.0, 0.5, 400)
    low, high = bootstrap(losses)
    half = 1.96 * losses.std(ddof=1) / np.sqrt(len(losses))
    assert low == pytest.approx(losses.mean() - half, abs=0.12 * half)
    assert high == pytest.approx(losses.mean() + half, abs=0.12 * half)
    assert (low, high) == bootstrap(losses)


def test_intervals_hold_the_mean_of_the_source_95_times_in_100():
    random = np.random.default_rng(0)
    intervals = [bootstrap(random.normal(2.0, 1.0, 100)) for _ in range(300)]
    assert np.mean([low <= 2.0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.035)


def test_chunks_are_drawn_not_tokens():
    """Tokens of a chunk that are all alike tell no more than one of them."""
    by_chunk = np.random.default_rng(1).normal(size=(50, 1))
    found = point(np.repeat(by_chunk, 128, axis=1), 1.25, hard_share=0.5)
    half = 1.96 * by_chunk.std() / np.sqrt(50)
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.15)
    assert found["loss"] == pytest.approx(by_chunk.mean())
    assert found["ppl"] == pytest.approx(np.exp(by_chunk.mean()))
    assert (found["flops"], found["hard_share"]) == (1.25, 0.5)
    assert point(np.full((3, 128), 0.5), 1.0)["low"] == 0.5


def test_the_losses_of_a_model_are_the_plain_ones(golden):
    ids = np.random.default_rng(0).integers(0, golden.config.vocab_size, (11, 129)).astype(np.int32)  # of 8 at a time
    found = model_losses(golden.model, golden.params, ids)
    logits = np.asarray(golden.model.apply({"params": golden.params}, jnp.asarray(ids[:, :-1]))[0], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    taken = np.take_along_axis(probabilities, ids[:, 1:, None], axis=-1)[..., 0]
    assert found.shape == (11, 128)
    np.testing.assert_allclose(found, -np.log(taken), rtol=1e-4)


def test_speed_counts_the_tokens_of_all_texts(golden, monkeypatch):
    monkeypatch.setattr(speed, "PROMPT", 4)
    monkeypatch.setattr(speed, "TOKENS", 4)
    monkeypatch.setattr(speed, "REPEATS", 1)
    monkeypatch.setattr(speed, "BATCHES", (1, 3))
    seconds = iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: 6.0 * next(seconds))
    ids = np.random.default_rng(0).integers(0, golden.config.vocab_size, (2, 129)).astype(np.int32)
    found = speed.generation_speed(BaseDecoder(golden.model), golden.params, ids)
    assert found == {  # 3 tokens of each text in 6 seconds, beside the first one
        "1": {"tokens_per_second": 0.5, "exit_rates": [1.0]}, "3": {"tokens_per_second": 1.5, "exit_rates": [1.0]},
    }  # fmt: skip
