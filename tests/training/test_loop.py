"""The loop over epochs: how many updates a call makes, how long a run may be, what an epoch is trained with."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError, NumericalError
from newllm_jax.training.clock import Clock
from newllm_jax.training.feed import DeviceFeed
from newllm_jax.training.loop import Pieces, Training, fit, run_epoch
from newllm_jax.training.losses import Sums
from newllm_jax.training.place import Place
from newllm_jax.training.split import Split
from newllm_jax.training.step import Totals, init_state, make_evaluation, make_updates, train_step
from newllm_jax.training.stopping import Stopping

pytestmark = pytest.mark.quick

QUIET = SimpleNamespace(progress=lambda *_: None, epoch=lambda _: None)
SGD, KEY = optax.sgd(1e-3), jax.random.key(0)


def loss(params, batch, present, key, carry):
    """A parabola around each example."""
    return Sums(jnp.sum(jnp.square(params - batch), where=present), jnp.int32(0), jnp.sum(present)), carry


TRAINING = Training(
    make_updates(partial(train_step, loss, SGD)), make_evaluation(loss), optax.constant_schedule(1e-3), None
)


class Saved(list):
    """Stands for the checkpoints: remembers the epochs, and their records until all is written."""

    is_within_epoch = False

    def __init__(self):
        self.records = []

    def save(self, epoch, state, history, record):
        self.append(epoch)
        self.records.append({**record, "history": list(history)})

    def wait(self):
        pass

    def place(self, epoch, state):
        return Place.start(epoch, state)


def fit_numbers(training, state, config: NewLLMConfig, saved: Saved, history=()):
    """`fit` on the numbers 0, 1, 2, 3."""
    split, stopping = Split.from_arrays(jnp.arange(4.0)), Stopping(Clock(), Path("run"), config)
    splits = {"train": split, "validation": split}
    return fit(training, state, splits, config, saved, QUIET, stopping, history)


def fitted(config: NewLLMConfig):
    """A run on a few numbers: its last state, its history and the epochs saved."""
    saved = Saved()
    state, history = fit_numbers(TRAINING, init_state(jnp.float32(5), SGD), config, saved)
    return state, history, saved


def test_two_thousand_epochs_of_less_than_a_second():
    config = NewLLMConfig(num_epochs=2000, patience=2000, minimum_gain=0.0, batch_size=4)
    state, history, saved = fitted(config)
    assert saved == list(range(1, 2001))
    value = np.float64(5)
    for epoch in history[:3]:  # one update an epoch, of the mean gradient
        value -= 1e-3 * 2 * (value - 1.5)
        assert epoch["val_loss"] == pytest.approx(np.mean((value - np.arange(4)) ** 2), rel=1e-5)
    assert float(state.params) == pytest.approx(1.5 + 3.5 * (1 - 2e-3) ** 2000, rel=1e-3)


def test_a_record_that_is_written_late_is_that_of_its_epoch():
    _, history, saved = fitted(NewLLMConfig(num_epochs=3, batch_size=4))
    assert [record["history"] for record in saved.records] == [history[:1], history[:2], history]


def failure(which: str, bad: int, first_piece: int, seconds: float) -> str:
    """What an epoch of eight updates says whose update number `bad` (from 1) has a loss or gradient of NaN."""

    def failing(params, batch, present, key, carry):
        values = {
            "loss": jnp.where(batch == bad, jnp.nan, params),
            "gradient": jnp.sqrt(jnp.where(batch == bad, params * 0, 1.0)),  # steep without end at 0
        }
        return Sums(jnp.sum(values[which]), jnp.int32(0), jnp.sum(present)), carry

    updates, pieces = make_updates(partial(train_step, failing, SGD)), Pieces(8, seconds)
    pieces.size = first_piece
    order = jnp.arange(8, dtype=jnp.int32)[:, None]
    with pytest.raises(NumericalError) as error:
        place = Place.start(1, init_state(jnp.float32(5), SGD))
        list(run_epoch(updates, place, DeviceFeed(jnp.arange(1.0, 9.0), order), KEY, pieces))
    return str(error.value)


@pytest.mark.parametrize("which", ["loss", "gradient"])
@pytest.mark.parametrize("first_piece, seconds", [(1, 0.0), (8, 1.0), (3, 0.0)])
def test_numbers_that_fail_name_the_update_wherever_the_epoch_is_cut(which, first_piece, seconds):
    assert failure(which, 6, first_piece, seconds) == f"the {which} of update 6 of 8 is not finite"


@pytest.mark.parametrize(
    "clip_norm, precision, hint",
    [
        (None, "fp32", "a lower learning_rate"),
        (None, "tf32", "a lower learning_rate or precision fp32"),
        (optax.constant_schedule(1.0), "bf16", "a lower learning_rate or lower clip_norms or precision fp32"),
    ],
)
def test_numbers_that_fail_hint_at_the_settings_that_a_training_has(clip_norm, precision, hint):
    training = replace(TRAINING, clip_norm=clip_norm, precision=precision)
    with pytest.raises(NumericalError) as error:
        fit_numbers(training, init_state(jnp.float32(jnp.nan), SGD), NewLLMConfig(), Saved())
    assert str(error.value) == (
        f"epoch 1: the loss of update 1 of 1 is not finite; there is no checkpoint yet; try a new run with {hint}"
    )


@pytest.mark.parametrize("damaged", ["params", "opt_state"])
def test_a_restored_state_that_is_not_finite_is_not_blamed_on_the_settings(damaged):
    _, history, saved = fitted(NewLLMConfig(num_epochs=2, batch_size=4))
    adam = optax.adam(1e-3)
    state = init_state(jnp.float32(5), adam)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf, getattr(state, damaged))
    saved.folder = "RUN/checkpoints"
    with pytest.raises(InputError, match="^RUN/checkpoints: the checkpoint of epoch 2 is damaged: some of its numbers"):
        fit_numbers(TRAINING, replace(state, **{damaged: bad}), NewLLMConfig(), saved, history)


def orders_and_keys(seed: int) -> list[tuple[list[int], list[int]]]:
    """The places of the batches and the key of dropout of three epochs: 7 examples in arrays with room for 10."""
    seen = []

    def updates(state, totals, data, order, start, stop, key):
        if start == 0:
            seen.append((np.ravel(order).tolist(), jax.random.key_data(key).tolist()))
        return state, Totals(Sums(jnp.float32(1), jnp.int32(0), jnp.int32(1)), jnp.float32(1))

    config = NewLLMConfig(num_epochs=3, patience=3, batch_size=3, seed=seed)
    split = Split(jnp.arange(10.0), 7)
    training = Training(updates, make_evaluation(loss), optax.constant_schedule(1e-3), None)
    splits, stopping = {"train": split, "validation": split}, Stopping(Clock(), Path("run"), config)
    fit(training, init_state(jnp.float32(5), SGD), splits, config, Saved(), QUIET, stopping)
    return seen


def test_every_epoch_of_every_seed_has_an_order_and_masks_of_its_own():
    seen = orders_and_keys(0) + orders_and_keys(1)
    assert seen[:3] == orders_and_keys(0)
    assert len(seen) == 6
    for which in (0, 1):
        assert len({tuple(epoch[which]) for epoch in seen}) == 6
    for order, _ in seen:
        assert sorted(order[:7]) == list(range(7))  # each example once
        assert set(order[7:]) == {-1}  # and none of the empty places
        assert order[:7] != list(range(7))
