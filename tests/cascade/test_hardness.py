"""Scores, the quantile threshold and the counts that follow from it."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade import hardness
from newllm_jax.config import Criterion
from newllm_jax.errors import InputError, NumericalError

pytestmark = pytest.mark.quick

PUBLISHED = {  # hard_ratio, tokens -> hard tokens of five stages
    (0.6, 128_000): [76_800, 46_080, 27_648, 16_589, 9_953],
    (0.6, 12_800): [7_680, 4_608, 2_765, 1_659, 995],
    (0.9, 128_000): [115_200, 103_680, 93_312, 83_980, 75_582],
}


def distinct_scores(tokens, seed=0):
    """Different float32 values in random order, many of them neighbours."""
    scores = np.float32(0.1) + np.arange(tokens, dtype=np.float32) * np.float32(1e-6)
    assert len(np.unique(scores)) == tokens
    return np.random.default_rng(seed).permutation(scores)


@pytest.mark.parametrize(("ratio", "tokens"), PUBLISHED)
def test_published_counts(ratio, tokens):
    for hard in PUBLISHED[ratio, tokens]:
        scores = distinct_scores(tokens)
        chosen = hardness.select_hard(scores, hardness.hardness_threshold(scores, ratio))
        assert len(chosen) == hard == hardness.count_hard(tokens, ratio)
        np.testing.assert_array_equal(np.sort(scores[chosen]), np.sort(scores)[:hard])
        tokens = hard


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.9])
def test_threshold_is_the_interpolated_quantile(ratio):
    scores = np.random.default_rng(1).normal(size=1004).astype(np.float32)
    expected = np.quantile(scores.astype(np.float64), ratio)
    threshold = hardness.hardness_threshold(scores, ratio)
    assert threshold <= expected and threshold == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(hardness.select_hard(scores, threshold), np.flatnonzero(scores <= expected))


def test_threshold_between_neighbouring_floats_lets_no_token_more_in():
    low = np.float32(0.3)
    scores = np.asarray([low, np.nextafter(low, np.float32(1))])
    threshold = hardness.hardness_threshold(scores, 0.9)  # rounded to the nearest it would be the upper one
    assert np.float32(np.quantile(scores.astype(np.float64), 0.9)) == scores[1]
    np.testing.assert_array_equal(hardness.select_hard(scores, threshold), [0])
    assert bool(jnp.asarray(scores)[1] > threshold)  # on the device too


def test_ties_at_the_threshold_are_all_hard():
    scores = np.asarray([5, 1, 2, 2, 2, 2, 3, 0, 4, 6], np.float32)
    threshold = hardness.hardness_threshold(scores, 0.4)
    assert threshold == 2
    assert len(hardness.select_hard(scores, threshold)) == 6 > hardness.count_hard(10, 0.4) == 4


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan"), True, "0.6", None])
def test_ratio_out_of_range(ratio):
    with pytest.raises(InputError, match="hard_ratio: (must be above 0 and below 1|.* is not a number)"):
        hardness.hardness_threshold(np.ones(4), ratio)


def test_no_tokens_left():
    with pytest.raises(InputError, match="no tokens are left"):
        hardness.hardness_threshold(np.ones(0), 0.6)


def test_score_that_is_not_a_number():
    with pytest.raises(NumericalError):
        hardness.hardness_threshold(np.asarray([1, np.nan, 0]), 0.6)


def test_scores():
    logits = np.random.default_rng(2).normal(size=(3, 7)).astype(np.float32) * 3
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    entropy = -(probabilities * np.log(probabilities)).sum(-1)
    np.testing.assert_allclose(hardness.predictive_entropy(jnp.asarray(logits)), entropy, rtol=1e-5)
    np.testing.assert_allclose(hardness.max_probability(jnp.asarray(logits)), probabilities.max(-1), rtol=1e-5)
    h_in, h_out = np.asarray([[1.0, 0, 0], [1, 2, 2]]), np.asarray([[1.0, 1, 0], [-2, -4, -4]])
    np.testing.assert_allclose(
        hardness.cosine_similarity(jnp.asarray(h_in), jnp.asarray(h_out)), [0.5**0.5, -1], rtol=1e-6
    )
    assert hardness.cosine_similarity(jnp.zeros((1, 3)), jnp.ones((1, 3))) == 0


@pytest.mark.parametrize("criterion", [name for name in get_args(Criterion) if name != "probe"])
def test_every_criterion_is_low_for_hard_tokens(criterion):
    h_in = jnp.asarray([[1.0, 0.0]] * 2)
    h_out = jnp.asarray([[1.0, 0.1], [-1.0, 0.5]])  # the second token has turned away
    logits = jnp.asarray([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0]])  # and its prediction is unsure
    easy, hard = jax.jit(hardness.token_scores, static_argnums=0)(criterion, h_in, h_out, logits)
    assert hard < easy


def test_unknown_criterion():
    with pytest.raises(InputError, match="criterion: must be one of cosine, entropy, max_probability, margin"):
        hardness.token_scores("loss", jnp.ones(2), jnp.ones(2), jnp.ones(2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="criterion: must be a score of a single pass"):
        hardness.token_scores("probe", jnp.ones(2), jnp.ones(2), jnp.ones(2))


def test_margin():
    logits = jnp.log(jnp.asarray([[0.7, 0.2, 0.1], [0.1, 0.45, 0.45]]))
    np.testing.assert_allclose(hardness.margin(logits), [0.5, 0.0], atol=1e-6)
