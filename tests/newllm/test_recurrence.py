"""The recurrence against a step-by-step float64 re-computation, and its own backward pass against JAX's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.newllm.recurrence import CellParams, dropout_keep, next_context, scan, scan_plain

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def strict_promotion():
    """No dtype is widened unless the code says so."""
    with jax.numpy_dtype_promotion("strict"):
        yield


TIME, BATCH, HIDDEN, CONTEXT, LAYERS = 9, 3, 8, 6, 4
HIGHEST = jax.lax.Precision.HIGHEST


def random_params(scale: float = 0.5) -> CellParams:
    draw = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(scale * draw.standard_normal(shape), jnp.float32)

    return CellParams(
        context_in=array(CONTEXT, HIDDEN),
        hidden=tuple((array(HIDDEN, HIDDEN), array(HIDDEN)) for _ in range(LAYERS - 1)),
        gates=(array(HIDDEN, 3 * CONTEXT), array(3 * CONTEXT)),
        norm=(1 + array(CONTEXT), array(CONTEXT)),
    )


@pytest.fixture
def inputs():
    draw = np.random.default_rng(1)
    context = jnp.asarray(draw.standard_normal((BATCH, CONTEXT)), jnp.float32)
    tokens = jnp.asarray(draw.standard_normal((TIME, BATCH, HIDDEN)), jnp.float32)
    keep = jnp.asarray(draw.random((TIME, LAYERS, BATCH, HIDDEN)) > 0.25)
    return context, tokens, keep


def numpy_scan(params, context, tokens, keep, dropout):
    """The equations of the report, one token of one text at a time, in float64."""
    p = jax.tree.map(lambda array: np.asarray(array, np.float64), params)
    context, tokens = np.asarray(context, np.float64).copy(), np.asarray(tokens, np.float64)
    keep = None if keep is None else np.asarray(keep)
    outputs = np.zeros(tokens.shape)
    for t in range(tokens.shape[0]):
        for b in range(tokens.shape[1]):
            c = context[b]
            h = np.maximum(tokens[t, b] + c @ p.context_in, 0)
            h = h if keep is None else h * keep[t, 0, b] / (1 - dropout)
            for layer, (kernel, bias) in enumerate(p.hidden, start=1):
                h = np.maximum(h @ kernel + bias, 0)
                h = h if keep is None else h * keep[t, layer, b] / (1 - dropout)
            outputs[t, b] = h
            size = len(c)
            forget, update, delta = (
                h @ p.gates[0][:, part * size : (part + 1) * size] + p.gates[1][part * size : (part + 1) * size]
                for part in range(3)
            )
            mixed = c / (1 + np.exp(-forget)) + delta / (1 + np.exp(-update))
            normed = (mixed - mixed.mean()) / np.sqrt(mixed.var() + 1e-5)
            context[b] = np.clip(normed * p.norm[0] + p.norm[1], -10, 10)
    return context, outputs


@pytest.mark.parametrize("form", [scan, scan_plain], ids=["scan", "scan_plain"])
@pytest.mark.parametrize("dropped", [False, True])
def test_equals_the_equations_step_by_step(form, dropped, inputs):
    context, tokens, keep = inputs
    keep = keep if dropped else None
    last, hidden = form(random_params(), context, tokens, keep, 0.25, HIGHEST)
    expected_last, expected_hidden = numpy_scan(random_params(), context, tokens, keep, 0.25)
    np.testing.assert_allclose(last, expected_last, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(hidden, expected_hidden, rtol=2e-5, atol=2e-5)


def test_dropout_matters(inputs):
    context, tokens, keep = inputs
    with_dropout = scan(random_params(), context, tokens, keep, 0.25, HIGHEST)[1]
    without = scan(random_params(), context, tokens, None, 0.25, HIGHEST)[1]
    assert float(jnp.abs(with_dropout - without).max()) > 0.1


@pytest.mark.parametrize("dropped", [False, True])
def test_own_backward_pass_equals_the_plain_scans(dropped, inputs):
    context, tokens, keep = inputs
    keep = keep if dropped else None
    weights_last, weights_hidden = (
        jax.random.normal(jax.random.key(index), shape)
        for index, shape in enumerate([(BATCH, CONTEXT), (TIME, BATCH, HIDDEN)])
    )

    def objective(form, params, context, tokens):
        last, hidden = form(params, context, tokens, keep, 0.25, HIGHEST)
        return jnp.sum(last * weights_last) + jnp.sum(hidden * weights_hidden)

    own, plain = (
        jax.grad(objective, argnums=(1, 2, 3))(form, random_params(), context, tokens) for form in (scan, scan_plain)
    )
    for ours, reference in zip(jax.tree.leaves(own), jax.tree.leaves(plain), strict=True):
        assert float(jnp.abs(reference).max()) > 1e-3
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5 * float(jnp.abs(reference).max()))


def test_context_is_clipped():
    gates, context = jnp.zeros((1, 6)), jnp.array([[5.0, -3.0]])
    unclipped = next_context(context, gates, (jnp.ones(2), jnp.zeros(2)))
    clipped = next_context(context, gates, (jnp.full(2, 100.0), jnp.zeros(2)))
    np.testing.assert_allclose(unclipped, [[1, -1]], atol=1e-4)
    assert clipped.tolist() == [[10, -10]]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_right_share_independently(rate):
    keep = np.asarray(dropout_keep(jax.random.key(0), rate, (40, 50, 101)), np.float64)
    assert keep.shape == (40, 50, 101)
    deviation = np.sqrt(rate * (1 - rate) / keep.size)
    assert abs(keep.mean() - (1 - rate)) < 4 * deviation
    for axis in range(3):  # no neighbour tells of its neighbour
        first, second = (
            np.take(keep, range(keep.shape[axis] - 1), axis),
            np.take(keep, range(1, keep.shape[axis]), axis),
        )
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / np.sqrt(first.size)


def test_dropout_differs_by_key_and_repeats_for_the_same():
    draws = [np.asarray(dropout_keep(jax.random.key(seed), 0.5, (64,))) for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()
