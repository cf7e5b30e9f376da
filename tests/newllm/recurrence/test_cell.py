"""One step: the clipped context vector, and rows of one size."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.newllm.recurrence.cell import next_context, rms_norm

pytestmark = pytest.mark.quick


def test_context_is_clipped():
    gates, context = jnp.zeros((1, 6)), jnp.array([[5.0, -3.0]])
    unclipped = next_context(context, gates, (jnp.ones(2), jnp.zeros(2)))
    clipped = next_context(context, gates, (jnp.full(2, 100.0), jnp.zeros(2)))
    np.testing.assert_allclose(unclipped, [[1, -1]], atol=1e-4)
    assert clipped.tolist() == [[10, -10]]


def test_rows_have_a_mean_square_of_one():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 40)) * [[1], [10], [100]], jnp.float32)
    np.testing.assert_allclose(jnp.mean(jnp.square(rms_norm(x)), -1), 1, rtol=1e-4)
    np.testing.assert_allclose(rms_norm(x.T, 0), rms_norm(x).T, rtol=1e-6)
    assert not rms_norm(jnp.zeros((2, 3))).any()
