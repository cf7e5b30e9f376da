"""One step: the clipped context vector, and masks of dropout that are what independent draws are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.newllm.recurrence.cell import dropout_mask, dropout_seeds, next_context

pytestmark = pytest.mark.quick


def test_context_is_clipped():
    gates, context = jnp.zeros((1, 6)), jnp.array([[5.0, -3.0]])
    unclipped = next_context(context, gates, (jnp.ones(2), jnp.zeros(2)))
    clipped = next_context(context, gates, (jnp.full(2, 100.0), jnp.zeros(2)))
    np.testing.assert_allclose(unclipped, [[1, -1]], atol=1e-4)
    assert clipped.tolist() == [[10, -10]]


def mask(seed: int, rate: float, shape: tuple[int, ...], first: int = 0) -> np.ndarray:
    numbers = first + jnp.arange(np.prod(shape), dtype=jnp.uint32)
    return np.asarray(dropout_mask(dropout_seeds(jax.random.key(seed)), rate, numbers)).reshape(shape)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return abs(np.corrcoef(first.ravel(), second.ravel())[0, 1])


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("first", [0, 2**31 - 100])
def test_dropout_keeps_the_right_share_independently(rate, first):
    kept = mask(0, rate, (40, 64, 512), first).astype(np.float64)
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / kept.size)
    for axis in range(3):  # no neighbour tells of its neighbour
        pair = (np.take(kept, range(start, kept.shape[axis] - 1 + start), axis) for start in (0, 1))
        assert correlation(*pair) < 4 / np.sqrt(kept.size)
    # Nor do rows and columns have shares of their own.
    for axes in ((0, 1), (1, 2), (0, 2)):
        spread = kept.mean(axes).std() / np.sqrt(rate * (1 - rate) * kept.mean(axes).size / kept.size)
        assert 0.6 < spread < 1.4


def test_dropout_of_one_update_tells_nothing_of_the_next():
    masks = [mask(seed, 0.5, (1 << 18,)).astype(np.float64) for seed in range(6)]
    for first in range(6):
        for second in range(first):
            assert correlation(masks[first], masks[second]) < 4.5 / np.sqrt(1 << 18)


def test_dropout_repeats_for_the_same_key_and_any_part_of_it_can_be_had():
    whole = mask(0, 0.5, (1000,))
    assert (whole == mask(0, 0.5, (1000,))).all()
    assert (whole[300:] == mask(0, 0.5, (700,), first=300)).all()
    assert (whole != mask(1, 0.5, (1000,))).any()


def test_the_hash_is_the_one_that_was_chosen():
    def mix(x):
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    numbers, (first, second) = [0, 1, 12345, 2**32 - 1], (17, 2**31 + 3)
    expected = [mix(mix((number + first) % 2**32) ^ second) >= 2**30 for number in numbers]
    seeds = jnp.array([first, second], jnp.uint32)
    assert dropout_mask(seeds, 0.25, jnp.array(numbers, jnp.uint32)).tolist() == expected
