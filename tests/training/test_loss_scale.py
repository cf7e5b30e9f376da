"""Dynamic loss scaling: what a skipped update leaves alone, when the scale moves, that overflow for ever ends a run."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.errors import NumericalError
from newllm_jax.training import loss_scale
from newllm_jax.training.feed import DeviceFeed
from newllm_jax.training.loop import Pieces, run_epoch
from newllm_jax.training.loss_scale import LossScale, initial_loss_scale, next_loss_scale
from newllm_jax.training.place import Place
from newllm_jax.training.step import Sums, Totals, init_state, make_updates, train_step

pytestmark = pytest.mark.quick

ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-2, 1e-3, 10)))
PRESENT, KEY = jnp.ones(2, bool), jax.random.key(0)


def loss(params, batch, present, key, carry):
    """A line through the batch; whatever is infinite or NaN in it is so in the loss or in the gradients."""
    count = jnp.sum(present)
    return Sums(jnp.sum(jnp.square(batch @ params["w"])), count, count), carry


def overflowing(params, batch, present, key, carry):
    """Finite itself, with a gradient that is not: the square root at 0."""
    count = jnp.sum(present)
    return Sums(jnp.sum(jnp.sqrt(params["w"] * 0)), count, count), carry


def scale_of(value=2.0**15, good=0, skipped=0) -> LossScale:
    return LossScale(jnp.float32(value), jnp.int32(good), jnp.int32(skipped))


def numbers(scale):
    return float(scale.value), int(scale.good), int(scale.skipped)


@pytest.fixture
def params():
    return {"w": jnp.array([0.5, -2.0, 1.0])}


@pytest.fixture
def batch():
    return jnp.array([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.1]])


def test_only_fp16_has_one():
    assert [initial_loss_scale(name) for name in ("fp32", "tf32", "bf16")] == [None] * 3
    assert numbers(initial_loss_scale("fp16")) == (2.0**15, 0, 0)


def test_it_halves_at_once_and_doubles_after_2000_good_updates_in_a_row():
    good, bad = jnp.array(True), jnp.array(False)
    after, skip = next_loss_scale(scale_of(good=1999), bad)
    assert (numbers(after), bool(skip)) == ((2.0**14, 0, 1), True)
    after, skip = next_loss_scale(scale_of(good=1998), good)
    assert (numbers(after), bool(skip)) == ((2.0**15, 1999, 0), False)
    assert numbers(next_loss_scale(after, good)[0]) == (2.0**16, 0, 0)
    assert numbers(next_loss_scale(scale_of(2.0**24, 1999), good)[0]) == (2.0**24, 0, 0)


def test_below_1_nothing_is_skipped():
    after, skip = next_loss_scale(scale_of(2.0), jnp.array(False))
    assert (float(after.value), bool(skip)) == (1.0, True)
    after, skip = next_loss_scale(after, jnp.array(False))
    assert (float(after.value), bool(skip)) == (0.5, False)


def test_a_power_of_two_changes_no_bit_of_the_update(params, batch):
    plain, totals = train_step(loss, ADAM, init_state(params, ADAM), batch, PRESENT, KEY)
    scaled, scaled_totals = train_step(loss, ADAM, init_state(params, ADAM, scale_of()), batch, PRESENT, KEY)
    jax.tree.map(np.testing.assert_array_equal, scaled.params, plain.params)
    jax.tree.map(np.testing.assert_array_equal, scaled.opt_state, plain.opt_state)
    assert scaled_totals == totals  # the norm before clipping, of the gradients of the loss itself
    assert numbers(scaled.loss_scale) == (2.0**15, 1, 0)


@pytest.mark.parametrize("loss_fn", [loss, overflowing])
def test_a_skipped_update_leaves_parameters_moments_and_counts(params, batch, loss_fn):
    before, _ = train_step(loss, ADAM, init_state(params, ADAM, scale_of()), batch, PRESENT, KEY)
    batch = batch.at[0, 0].set(jnp.inf) if loss_fn is loss else batch
    after, totals = train_step(loss_fn, ADAM, before, batch, PRESENT, KEY)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    assert numbers(after.loss_scale) == (2.0**14, 0, 1)
    assert float(totals.grad_norm) == 0
    assert int(totals.sums.count) == (0 if loss_fn is loss else 2)  # a loss that is not finite is not added
    unscaled, totals = train_step(loss_fn, ADAM, init_state(params, ADAM), batch, PRESENT, KEY)
    assert not jnp.isfinite(totals.grad_norm)
    assert not jnp.isfinite(unscaled.params["w"]).all()


def epoch(loss_fn, data, steps, scale):
    """An epoch of `steps` updates of a batch of two, in pieces of one; gives the last state and all scales seen."""
    updates, seen = make_updates(partial(train_step, loss_fn, ADAM)), []

    def watched(*arguments):
        state, totals = updates(*arguments)
        seen.append(float(state.loss_scale.value))
        return state, totals

    state = init_state({"w": jnp.array([0.5, -2.0, 1.0])}, ADAM, scale)
    order = jnp.arange(2 * steps, dtype=jnp.int32).reshape(steps, 2) % len(data)
    *_, last = run_epoch(watched, Place.start(1, state), DeviceFeed(data, order), KEY, Pieces(steps, seconds=0.0))
    return last.state, last.totals, seen


def test_overflow_that_stays_ends_the_run(batch):
    with pytest.raises(NumericalError, match="the gradient of update 16 of 100 is not finite"):
        epoch(overflowing, batch, 100, scale_of())
    with pytest.raises(NumericalError, match="the loss of update 16 of 100 is not finite"):
        epoch(loss, batch * jnp.nan, 100, scale_of())
    with pytest.raises(NumericalError, match="no update had a finite loss"):
        epoch(loss, batch * jnp.nan, 3, scale_of())


def test_overflow_that_passes_costs_its_updates_only(batch):
    data = jnp.concatenate([batch, batch.at[0, 1].set(jnp.nan), batch])
    state, totals, scales = epoch(loss, data, 6, scale_of())
    assert scales == [2.0**15, 2.0**14, 2.0**14, 2.0**14, 2.0**13, 2.0**13]
    assert int(state.loss_scale.skipped) == 2
    assert int(totals.sums.count) == 8
    alone, alone_totals, _ = epoch(loss, batch, 4, scale_of())
    jax.tree.map(np.testing.assert_array_equal, state.params, alone.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, alone.opt_state)
    assert (totals.sums, totals.grad_norm) == (alone_totals.sums, alone_totals.grad_norm)


def test_any_cut_of_an_epoch_gives_the_same_bits(batch, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    monkeypatch.setattr(loss_scale, "LARGEST", 2.0**120)
    batch *= 1000
    updates, order = make_updates(partial(train_step, loss, ADAM)), jnp.tile(jnp.array([[0, 1]], jnp.int32), (20, 1))

    def run(borders):
        state = init_state({"w": jnp.array([0.5, -2.0, 1.0])}, ADAM, scale_of(2.0**120))
        totals = Totals.zero()
        for start, stop in itertools.pairwise(borders):
            state, totals = updates(state, totals, batch, order, start, stop, KEY)
        return state, totals

    whole = run([0, 20])
    jax.tree.map(np.testing.assert_array_equal, run([0, 1, 7, 20]), whole)
    assert int(whole[0].loss_scale.skipped) > 2  # the scale grew into overflow, again and again
