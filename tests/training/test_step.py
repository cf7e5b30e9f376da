"""The update loop: batches, the masked last batch, cuts that change nothing."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.newllm.loss import next_word_loss
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import init_params
from newllm_jax.training.average import Average
from newllm_jax.training.loop import evaluate
from newllm_jax.training.losses import Sums
from newllm_jax.training.split import Split, batches, epoch_order, take
from newllm_jax.training.step import Totals, init_state, make_evaluation, make_updates, train_step

MODEL = ContextVectorLM(vocabulary_size=20, embed_dim=8, hidden_dim=16, context_dim=12, num_layers=2)
LOSS = next_word_loss(MODEL)
ADAM = optax.adam(1e-2)
one_step = jax.jit(train_step, static_argnums=(0, 1))


@pytest.fixture(scope="module")
def data():
    return jnp.asarray(np.random.default_rng(1).integers(0, 20, (22, 9)), jnp.uint16)


@pytest.fixture
def state():
    return init_state(init_params(MODEL, 0), ADAM)


def same_bits(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)


def test_every_example_once_an_epoch_in_an_order_of_seed_and_epoch():
    order = epoch_order(3, 7, 100)
    assert sorted(order) == list(range(100))
    assert (order == epoch_order(3, 7, 100)).all()
    assert (order != epoch_order(3, 8, 100)).any()
    assert (order != epoch_order(4, 7, 100)).any()


def test_batches_fill_the_last_with_absent_places():
    cut = batches(np.arange(10, dtype=np.int32), 4)
    assert cut.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    _, present = take(jnp.arange(10), jnp.asarray(cut[2]))
    assert present.tolist() == [True, True, False, False]


def test_absent_examples_change_no_number(state, data):
    key = jax.random.key(0)
    loss = next_word_loss(MODEL.clone(dropout=0.0))  # dropout is drawn for the batch's shape
    padded, present = take(data, jnp.array([3, 5, -1, -1, -1]))
    padded = padded.at[2:].set(7)  # whatever stands there
    small, all_present = take(data, jnp.array([3, 5]))
    sgd = optax.sgd(1.0)  # Adam would magnify the rounding of the smallest gradients
    state = init_state(state.params, sgd)
    with_padding, padded_totals = one_step(loss, sgd, state, padded, present, key)
    without, totals = one_step(loss, sgd, state, small, all_present, key)
    assert int(padded_totals.sums.count) == int(totals.sums.count)
    for a, b in zip(jax.tree.leaves(with_padding.params), jax.tree.leaves(without.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    counted, _ = one_step(loss, sgd, state, padded, jnp.ones(5, bool), key)
    assert not same_bits(counted.params, without.params)


def test_an_update_tells_the_norm_of_the_gradient_before_it_is_clipped():
    def loss(params, batch, present, key, carry):
        return Sums(jnp.sum(batch @ params, where=present), jnp.int32(0), jnp.sum(present)), carry

    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    batch, present = jnp.array([[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]), jnp.array([True, True, False])
    after, totals = train_step(loss, clipped, init_state(jnp.zeros(2), clipped), batch, present, jax.random.key(0))
    assert float(totals.grad_norm) == pytest.approx(5)  # of the mean (3, 4) of the two that are present
    np.testing.assert_allclose(after.params, [-0.06, -0.08], rtol=1e-6)


def test_any_cut_of_an_epoch_gives_the_same_bits(data):
    updates, key = make_updates(partial(train_step, LOSS, ADAM)), jax.random.key(5)
    order = jnp.asarray(batches(epoch_order(0, 1, 22), 4))

    def epoch(borders):
        state, totals = init_state(init_params(MODEL, 0), ADAM), Totals.zero()
        for start, stop in itertools.pairwise(borders):
            state, totals = updates(state, totals, data, order, start, stop, key)
        return state, totals

    whole = epoch([0, 6])
    assert same_bits(epoch([0, 1, 2, 3, 4, 5, 6]), whole)
    assert same_bits(epoch([0, 4, 6]), whole)
    assert not same_bits(epoch([0, 5])[0].params, whole[0].params)


@pytest.mark.quick
def test_the_loop_equals_updates_one_by_one(data):
    order, key = batches(epoch_order(0, 1, 22), 4), jax.random.key(5)
    looped, totals = make_updates(partial(train_step, LOSS, ADAM))(
        init_state(init_params(MODEL, 0), ADAM), Totals.zero(), data, jnp.asarray(order), 0, 6, key
    )
    state, count, norm = init_state(init_params(MODEL, 0), ADAM), 0, 0.0
    for index, rows in enumerate(order):
        batch, present = take(data, jnp.asarray(rows))
        state, added = one_step(LOSS, ADAM, state, batch, present, jax.random.fold_in(key, index))
        count, norm = count + int(added.sums.count), norm + float(added.grad_norm)
    for a, b in zip(jax.tree.leaves(looped.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert int(totals.sums.count) == count == int((data[:, 1:] != 0).sum())
    assert float(totals.grad_norm) == pytest.approx(norm, rel=1e-5)


@pytest.mark.quick
def test_a_second_epoch_does_not_compile_again(data, state):
    updates, key = make_updates(partial(train_step, LOSS, ADAM)), jax.random.key(5)
    totals = Totals.zero()
    for epoch in (1, 2):
        order = jnp.asarray(batches(epoch_order(0, epoch, 22), 4))
        for start, stop in ((0, 2), (2, 6)):
            state, totals = updates(state, totals, data, order, start, stop, key)
    assert updates.function._cache_size() == 1  # type: ignore[attr-defined]


def test_evaluation_does_not_depend_on_the_batch_size(state, data):
    evaluation = make_evaluation(LOSS)
    by_size = [evaluate(evaluation, state.params, Split.from_arrays(data), size) for size in (1, 4, 22, 100)]
    for metrics in by_size[1:]:
        assert metrics["loss"] == pytest.approx(by_size[0]["loss"], rel=1e-6)
        assert metrics["accuracy"] == by_size[0]["accuracy"]
    assert by_size[0]["ppl"] == pytest.approx(np.exp(by_size[0]["loss"]))


def running_total(params, batch, present, key, carry):
    """A loss that hands the sum of all examples so far from batch to batch, and adds it to its loss."""
    seen = carry + jnp.sum(jnp.where(present, batch, 0))
    return Sums(params * seen, jnp.zeros((), jnp.int32), jnp.sum(present)), seen


def test_a_loss_may_hand_a_carry_from_batch_to_batch():
    data, order = jnp.arange(1.0, 6.0), jnp.asarray(batches(np.arange(5, dtype=np.int32), 2))
    optimizer = optax.sgd(0.0)
    state = dataclasses.replace(init_state(jnp.ones(()), optimizer), carry=jnp.zeros(()))
    updates, key = make_updates(partial(train_step, running_total, optimizer)), jax.random.key(0)
    state, totals = updates(state, Totals.zero(), data, order, 0, 1, key)
    assert float(state.carry) == 1 + 2
    state, totals = updates(state, totals, data, order, 1, 3, key)
    assert float(state.carry) == 15
    assert float(totals.sums.loss) == (1 + 2) + (1 + 2 + 3 + 4) + 15
    evaluation = make_evaluation(running_total)
    assert float(evaluation(jnp.ones(()), data, order, 3, jnp.zeros(())).loss) == 3 + 10 + 15
    assert float(evaluation(jnp.ones(()), data, order, 3, jnp.ones(())).loss) == 4 + 11 + 16


def test_validation_measures_the_average_of_the_parameters_where_there_is_one():
    state = init_state(jnp.ones(()), ADAM)
    assert state.evaluated is state.params
    assert dataclasses.replace(state, ema=Average(jnp.zeros(()), jnp.int32(0))).evaluated == 0
