"""Sampling against its definition: words in the order of their probability, as NumPy sorts them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.decoding.sampling import Sampling, narrow

pytestmark = pytest.mark.quick

DRAW = np.random.default_rng(0)
LOGITS = {
    "normal": 3 * DRAW.standard_normal(500),
    "ties": DRAW.integers(-3, 3, 500).astype(float),  # 0 and -0 among them
    "some excluded": np.where(DRAW.random(500) < 0.9, -np.inf, DRAW.standard_normal(500)),
    "large": 1e4 * DRAW.standard_normal(500),
    "one word": np.array([-2.0]),
}


def kept_by_sorting(logits, top_k, top_p):
    """Which words stay, by the rule itself; of equal ones all or none."""
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    least = -np.inf
    if top_k:
        least = logits[order[min(top_k, len(order)) - 1]]
    before = np.cumsum(probabilities[order]) - probabilities[order]
    return (logits >= max(least, logits[order[before < top_p]].min())) & np.isfinite(logits)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95])
@pytest.mark.parametrize("top_k", [0, 1, 7, 400, 10**6])
@pytest.mark.parametrize("name", LOGITS)
def test_the_words_that_stay_are_those_of_the_definition(name, top_k, top_p):
    logits = LOGITS[name].astype(np.float32)
    narrowed = np.asarray(jax.jit(narrow, static_argnums=1)(jnp.asarray(logits), Sampling(0.5, top_k, top_p)))
    expected = kept_by_sorting(logits.astype(float) / 0.5, top_k, top_p)
    assert expected.sum() > 0 and np.isfinite(narrowed).tolist() == expected.tolist()
    np.testing.assert_allclose(narrowed[expected], logits[expected] / 0.5, rtol=1e-6)
