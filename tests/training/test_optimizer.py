"""Clipping by epoch, learning-rate schedules, and Adam against its own equations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.training.optimizer import clipped_adam, clipping_schedule, learning_rate_schedule

pytestmark = pytest.mark.quick


def test_clipping_bounds_change_at_epochs_10_and_30():
    schedule = clipping_schedule((0.5, 1.0, 2.0), (10, 30), steps_per_epoch=100)
    bounds = [float(schedule(step)) for step in (0, 999, 1000, 2999, 3000, 100_000)]
    assert bounds == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0]
    assert float(clipping_schedule((0.3,), (), 100)(5000)) == pytest.approx(0.3)


def test_learning_rates():
    constant = learning_rate_schedule("constant", 1e-3, 0, 100)
    assert [float(constant(step)) for step in (0, 99, 1000)] == [pytest.approx(1e-3)] * 3
    cosine = learning_rate_schedule("cosine", 1e-3, 0, 100)
    expected = [0.5e-3 * (1 + np.cos(np.pi * step / 100)) for step in (0, 25, 50, 100)]
    assert [float(cosine(step)) for step in (0, 25, 50, 100)] == pytest.approx(expected, abs=1e-9)
    warm = learning_rate_schedule("cosine", 1e-3, 10, 110)
    assert [float(warm(step)) for step in (0, 5, 10, 60, 110, 200)] == pytest.approx(
        [0, 0.5e-3, 1e-3, 0.5e-3, 0, 0], abs=1e-9
    )


def test_weight_decay_is_that_of_adamw_and_only_of_matrices():
    clip = clipping_schedule((1e9,), (), 1)
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
    gradients = jax.tree.map(jnp.ones_like, params)
    for decay in (0.0, 0.1):
        optimizer = clipped_adam(optax.constant_schedule(0.5), clip, decay)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        np.testing.assert_allclose(updates["bias"], -0.5, rtol=1e-5)
        np.testing.assert_allclose(updates["kernel"], -0.5 * (1 + decay * 2), rtol=1e-5)


def test_adam_on_clipped_gradients_step_by_step():
    optimizer = clipped_adam(optax.constant_schedule(0.1), clipping_schedule((1.0, 5.0), (1,), steps_per_epoch=2))
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    state = optimizer.init(params)
    draw = np.random.default_rng(0)
    values, first, second = np.array([1.0, 2.0, 3.0]), np.zeros(3), np.zeros(3)
    for step, bound in enumerate([1.0, 1.0, 5.0, 5.0], start=1):
        raw = draw.standard_normal(3) * 4
        updates, state = optimizer.update(
            {"a": jnp.asarray(raw[:2], jnp.float32), "b": jnp.asarray(raw[2:], jnp.float32)}, state
        )
        params = optax.apply_updates(params, updates)
        gradient = raw * min(1.0, bound / np.linalg.norm(raw))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        values -= 0.1 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(np.concatenate([params["a"], params["b"]]), values, rtol=1e-5)
