"""Masks of dropout are what independent draws are, and any part of one can be had."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.newllm.dropout import Dropout, Rate, dropout_mask

pytestmark = pytest.mark.quick


def mask(seed: int, rate: float, shape: tuple[int, ...], first: int = 0) -> np.ndarray:
    places = first + jnp.arange(np.prod(shape), dtype=jnp.uint32)
    return np.asarray(Dropout.from_key(jax.random.key(seed), Rate.from_share(rate)).keeps(places)).reshape(shape)


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
    assert dropout_mask(seeds, Rate.from_share(0.25).least, jnp.array(numbers, jnp.uint32)).tolist() == expected


def test_what_is_kept_is_scaled_and_a_part_is_that_of_the_whole():
    key, x = jax.random.key(0), jnp.ones((50, 40))
    whole = Dropout.from_key(key, Rate.from_share(0.2)).drop(x)
    assert set(np.unique(whole)) == {0, 1.25}
    assert abs(float(whole.mean()) - 1) < 0.05
    part = Dropout.from_key(key, Rate.from_share(0.2), 10 * 40).drop(x[10:])
    assert (part == whole[10:]).all()
    assert (part != whole[:-10]).any()


def test_one_mask_can_be_for_many_rows_and_a_rate_of_0_changes_nothing():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 5, 40)), jnp.float32)
    dropped = Dropout.from_key(jax.random.key(0), Rate.from_share(0.5)).drop(x, x.shape[1:]) / x
    assert (dropped == dropped[0]).all()
    assert (dropped[:, 0] != dropped[:, 1]).any()
    assert (Dropout.from_key(jax.random.key(0), Rate.from_share(0)).drop(x) == x).all()


def test_rates_can_be_arguments_of_a_compiled_function():
    x, rates = jnp.ones((50, 40)), [0.0, 0.1, 0.7]
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *map(Rate.from_share, rates))
    found = jax.jit(jax.vmap(lambda rate: Dropout.from_key(jax.random.key(0), rate).drop(x)))(stacked)
    for ours, rate in zip(found, rates, strict=True):
        np.testing.assert_allclose(ours, Dropout.from_key(jax.random.key(0), Rate.from_share(rate)).drop(x), rtol=1e-6)
