"""One token through some layers: what the model computes of it, and what is left in the caches for those after it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.smollm.decoder import read_prompt
from newllm_jax.smollm.token_step import run_layers, unstack_layers, write_keys_and_values

pytestmark = pytest.mark.quick

CLOSE = {"rtol": 2e-5, "atol": 5e-5}
LENGTH, CAPACITY = 10, 16


@pytest.fixture(scope="module")
def layers(golden):
    return unstack_layers(golden.params["backbone"]["blocks"])


@pytest.fixture(scope="module")
def caches(golden):
    """After all but the last token of the golden texts."""
    return caches_after(golden, LENGTH)


def caches_after(golden, length):
    """The caches after so many of the golden tokens."""
    read = jax.jit(lambda params, ids: read_prompt(golden.model, params, ids, jnp.int32(length), CAPACITY).layers)
    return read(golden.params, golden["ids"][:, :length])


@pytest.fixture(scope="module")
def streams(golden):
    """The residual stream of the last token after 0, 1, ... layers, `[4, B, H]`, by transformers."""
    return jnp.asarray(golden["residuals"][:, :, LENGTH])


@pytest.mark.parametrize(("first", "stop"), [(0, 3), (0, 1), (1, 3), (2, 2)])
def test_a_range_of_layers(golden, layers, caches, streams, first, stop):
    x, written = run_layers(
        golden.config, "fp32", layers[first:stop], caches[first:stop], streams[first], jnp.int32(LENGTH)
    )
    np.testing.assert_allclose(x, streams[stop], **CLOSE)
    whole = caches_after(golden, LENGTH + 1)[first:stop]
    for ours, expected in zip(jax.tree.leaves(written), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours[:, : LENGTH + 1], expected[:, : LENGTH + 1], **CLOSE)


def test_keys_and_values_alone(golden, layers, caches, streams):
    """Of one residual stream for all the layers: what each writes for it."""
    x, position = streams[1], jnp.int32(LENGTH)
    written = write_keys_and_values(golden.config, "fp32", layers[1:], caches[1:], x, position)
    for number, ours in enumerate(written, 1):
        _, [expected] = run_layers(
            golden.config, "fp32", layers[number : number + 1], caches[number : number + 1], x, position
        )
        for part, before in zip(range(2), caches[number], strict=True):
            np.testing.assert_allclose(ours[part], expected[part], **CLOSE)
            assert jnp.abs(ours[part] - before)[:, LENGTH].max() > 0.1
            np.testing.assert_array_equal(ours[part][:, :LENGTH], before[:, :LENGTH])


def test_tokens_that_do_not_pass(golden, layers, caches, streams):
    """One of two texts passes: its stream is that of all layers; the other keeps its own, and writes its keys."""
    position, passing = jnp.int32(LENGTH), jnp.asarray([True, False])
    arguments = golden.config, "fp32", layers[1:], caches[1:], streams[1], position
    x, written = run_layers(*arguments, passing)
    np.testing.assert_allclose(x[0], streams[3][0], **CLOSE)
    np.testing.assert_array_equal(x[1], streams[1][1])
    _, all_passed = run_layers(*arguments)
    held = write_keys_and_values(*arguments)
    for ours, passed, kept in zip(*map(jax.tree.leaves, (written, all_passed, held)), strict=True):
        np.testing.assert_allclose(ours[0], passed[0], **CLOSE)
        np.testing.assert_allclose(ours[1], kept[1], **CLOSE)
    assert jnp.abs(written[1][0][1] - all_passed[1][0][1]).max() > 0.1
