"""The moving average of the parameters, against its equation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.training.average import Average
from newllm_jax.training.losses import Sums
from newllm_jax.training.step import init_state, train_step

pytestmark = pytest.mark.quick


def test_follows_its_equation():
    draw = np.random.default_rng(0).standard_normal((40, 3))
    average, expected = Average.start({"w": jnp.array([1e3, 0.1, -7.0])}), np.zeros(3)
    for update, params in enumerate(draw, start=1):
        average = average.update({"w": jnp.asarray(params, jnp.float32)}, 0.7)
        kept = min(0.7, (update - 1) / (update + 9))
        expected = kept * expected + (1 - kept) * params
        np.testing.assert_allclose(average.params["w"], expected, rtol=1e-5, atol=1e-6)
        if update == 1:  # nothing is left of what was drawn
            assert (average.params["w"] == jnp.asarray(params, jnp.float32)).all()
    assert int(average.updates) == 40


def parabola(params, batch, present, key, carry, part=None):
    return Sums(jnp.sum(jnp.square(params["w"] - batch)), jnp.int32(0), jnp.sum(present)), carry


def test_every_update_moves_it_and_it_is_what_is_evaluated():
    step = jax.jit(partial(train_step, parabola, optax.sgd(0.1), ema_decay=0.5))
    plain, state = (init_state({"w": jnp.float32(4)}, optax.sgd(0.1), averaged=each) for each in (False, True))
    averages = []
    for _ in range(12):
        plain, _ = step(plain, jnp.zeros(2), jnp.ones(2, bool), jax.random.key(0))
        state, _ = step(state, jnp.zeros(2), jnp.ones(2, bool), jax.random.key(0))
        averages.append(float(state.evaluated["w"]))
    assert plain.ema is None
    assert float(plain.evaluated["w"]) == float(state.params["w"]) < averages[-1] < averages[-2]  # it comes behind
    assert averages[0] == pytest.approx(4 * 0.8)
    assert averages[1] == pytest.approx(averages[0] / 11 + 4 * 0.8**2 * 10 / 11)
