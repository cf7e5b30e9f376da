"""The cross-entropy of New-LLM and its own gradients, beside Optax and JAX."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.newllm.loss import (
    COLUMNS,
    _in_one_pass,
    _in_two_passes,
    cross_entropy,
    cross_entropy_in_parts,
    logit_parts,
)

TIME, BATCH, HIDDEN, VOCABULARY = 5, 3, 8, 11

pytestmark = pytest.mark.quick


@pytest.fixture
def inputs():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    kernel = jax.random.normal(next(keys), (HIDDEN, VOCABULARY))
    bias = jax.random.normal(next(keys), (VOCABULARY,))
    states = 3 * jax.random.normal(next(keys), (TIME, BATCH, HIDDEN))
    targets = jax.random.randint(next(keys), (TIME, BATCH), 0, VOCABULARY)
    counted = jax.random.bernoulli(next(keys), 0.7, (TIME, BATCH))
    assert 0 < int(counted.sum()) < counted.size
    return kernel, bias, states, targets, counted


def test_products_in_parts_have_a_whole_number_of_columns(inputs):
    """Of a vocabulary of 33,278 words, no multiple of 8, a GPU computes them several times slower."""

    def sizes(compute) -> set[str]:
        """Of all operands and results of matrix products."""

        def loss(*floats):
            return compute("fp32", *floats, *inputs[3:]).loss

        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs[:3]).as_text()
        products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
        return {size for line in products for size in re.findall(r"(\d+)x", line)}

    assert str(VOCABULARY) in sizes(cross_entropy)
    found = sizes(partial(cross_entropy_in_parts, 2))
    assert str(COLUMNS) in found and str(VOCABULARY) not in found and str(2 * COLUMNS) not in found


@pytest.mark.parametrize("compute", [cross_entropy, partial(cross_entropy_in_parts, 2)], ids=["whole", "in parts"])
def test_value_and_gradients_are_those_of_optax(inputs, compute):
    *floats, targets, counted = inputs

    def reference(kernel, bias, states):
        logits = jnp.dot(states, kernel, precision=jax.lax.Precision.HIGHEST) + bias
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses, where=counted), jnp.sum((jnp.argmax(logits, -1) == targets) & counted)

    def ours(kernel, bias, states):
        sums = compute("fp32", kernel, bias, states, targets, counted)
        assert (sums.count.dtype, int(sums.count)) == (jnp.int32, int(counted.sum()))
        return 3 * sums.loss, sums.hits

    def scaled(*floats):
        loss, hits = reference(*floats)
        return 3 * loss, hits

    expected, found = (jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*floats) for f in (scaled, ours))
    (loss, hits), gradients = found
    assert float(ours(*floats)[0]) == pytest.approx(float(loss))  # without a gradient
    assert int(hits) == int(expected[0][1]) > 0
    np.testing.assert_allclose(loss, expected[0][0], rtol=1e-5)
    for one, other in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "texts", "words", "parts"),
    [
        (63, 512, 1000, 1),
        (63, 32, 1000, 1),
        (70, 64, 33_280, 5),
        (71, 64, 33_280, 5),
        (7, 2, 2**25, 7),
        (1, 2**20, 9, 1),
    ],
)
def test_logits_are_computed_in_the_fewest_parts_that_are_small_enough(steps, texts, words, parts):
    assert logit_parts(steps, texts, words) == parts


def test_no_array_holds_all_logits_of_a_large_vocabulary():
    """Of standard WikiText-2 they would take 570 MiB, and their gradient as much."""
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 33_280), (33_280,), (70, 64, 8))]
    targets, counted = (jax.ShapeDtypeStruct((70, 64), kind) for kind in (jnp.int32, jnp.bool_))

    def loss(*arguments):
        return cross_entropy_in_parts(logit_parts(70, 64, 33_280), "fp32", *arguments).loss

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*floats, targets, counted).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 400 * 2**20


def test_logits_far_from_zero_overflow_nothing(inputs):
    kernel, bias, states, targets, counted = inputs
    sums, gradient = jax.value_and_grad(
        lambda bias: cross_entropy("fp32", kernel, bias, states, targets, counted).loss
    )(bias + 500)  # fmt: skip
    plain = cross_entropy("fp32", kernel, bias, states, targets, counted)
    np.testing.assert_allclose(sums, plain.loss, rtol=1e-3)
    assert np.all(np.isfinite(gradient))


def test_counts_only_what_is_counted(inputs):
    *floats, targets, counted = inputs
    other = jnp.where(counted, targets, (targets + 1) % VOCABULARY)
    one, two = (cross_entropy("fp32", *floats, ids, counted) for ids in (targets, other))
    assert one == two
    assert int(one.count) == int(counted.sum())


def test_nothing_counted_is_nothing_lost(inputs):
    *floats, targets, counted = inputs
    value, gradients = jax.value_and_grad(
        lambda *floats: cross_entropy("fp32", *floats, targets, jnp.zeros_like(counted)).loss, (0, 1, 2)
    )(*floats)
    assert float(value) == 0
    assert not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("normalizer", [_in_one_pass, _in_two_passes])
def test_the_logarithm_of_the_sum_of_exponentials(normalizer):
    logits = np.random.default_rng(0).normal(scale=30, size=(4, 7, 300)).astype(np.float32)
    logits[0, 0] = -400
    largest, found = normalizer(jnp.asarray(logits))
    wide = logits.astype(np.float64)
    expected = wide.max(-1) + np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1))
    assert (largest == logits.max(-1)).all()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
