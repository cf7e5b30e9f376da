"""Checkpoints: what is kept, what a damaged one costs, that arrays come back bit for bit."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.errors import InputError
from newllm_jax.training.checkpoint import Checkpoints
from newllm_jax.training.loss_scale import LossScale, initial_loss_scale
from newllm_jax.training.step import init_state

pytestmark = pytest.mark.quick


def state_of(epoch: int):
    params = {"w": jnp.full((3, 2), epoch / 7, jnp.float32), "b": jnp.arange(4.0)}
    return init_state(params, optax.adam(optax.constant_schedule(1e-3)))


def save_all(folder, losses, every=5):
    with Checkpoints(folder, every) as checkpoints:
        for epoch, loss in enumerate(losses, start=1):
            checkpoints.save(epoch, state_of(epoch), {"history": list(range(epoch))}, loss)
        checkpoints.wait()
        return checkpoints.epochs


def test_keeps_every_fifth_the_best_and_the_latest_two(tmp_path):
    losses = [5.0, 4.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert save_all(tmp_path, losses) == [3, 5, 10, 12, 13]
    losses = [5.0, 4.0, 3.0, 2.0, 2.5, 2.4, 2.4]
    assert save_all(tmp_path / "other", losses, every=100) == [4, 6, 7]


def test_of_equal_losses_the_first_epoch_is_kept(tmp_path):
    assert save_all(tmp_path, [5.0, 4.0, 4.0, 4.0, 4.0, 4.0], every=100) == [2, 5, 6]  # as `best_epoch` has it


def test_parameters_that_cannot_be_read_are_an_error_that_names_the_epoch(tmp_path):
    save_all(tmp_path, [3.0, 2.0])
    shutil.rmtree(tmp_path / "epoch_1" / "params")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        for epoch in (1, 7):
            with pytest.raises(InputError, match=f"the checkpoint of epoch {epoch} cannot be read"):
                checkpoints.params(epoch, state_of(0).params)


def test_a_carry_and_an_average_are_parts_of_the_state(tmp_path):
    state = state_of(1).replace(
        carry={"context": jnp.arange(3.0)}, ema={"w": jnp.full((3, 2), 0.25), "b": jnp.arange(4.0)}
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, 1.0)
        checkpoints.wait()
        found, _ = checkpoints.latest(jax.tree.map(jnp.zeros_like, state))
    for left, right in zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True):
        assert (np.asarray(left) == np.asarray(right)).all()


def test_comes_back_bit_for_bit(tmp_path):
    save_all(tmp_path, [3.0, 2.0])
    with Checkpoints(tmp_path) as checkpoints:
        found, damaged = checkpoints.latest(state_of(0))
        assert (found.epoch, found.record, damaged) == (2, {"history": [0, 1]}, [])
        assert jax.tree.structure(found.state) == jax.tree.structure(state_of(2))
        for left, right in zip(jax.tree.leaves(found.state), jax.tree.leaves(state_of(2)), strict=True):
            assert (np.asarray(left) == np.asarray(right)).all()
        assert (checkpoints.params(1, state_of(0).params)["w"] == state_of(1).params["w"]).all()
        assert checkpoints.record() == {"history": [0, 1]}


def test_the_loss_scale_is_a_part_of_the_state(tmp_path):
    state = state_of(1).replace(loss_scale=LossScale(jnp.float32(2.0**11), jnp.int32(7), jnp.int32(4)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, 1.0)
        checkpoints.wait()
        found, _ = checkpoints.latest(state_of(0).replace(loss_scale=initial_loss_scale("fp16")))
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert jax.tree.leaves(found.state.loss_scale) == [2.0**11, 7, 4]


def test_what_comes_back_is_compiled_like_what_was_saved(tmp_path):
    compiled = jax.jit(lambda state: jax.tree.map(jnp.sin, state.params))
    compiled(state_of(1))
    save_all(tmp_path, [3.0])
    with Checkpoints(tmp_path) as checkpoints:
        found, _ = checkpoints.latest(state_of(0))
        compiled(found.state)
        compiled(state_of(0).replace(params=checkpoints.params(1, state_of(0).params)))
    assert compiled._cache_size() == 1


def test_a_damaged_checkpoint_costs_one_epoch(tmp_path):
    save_all(tmp_path, [3.0, 2.0, 1.0])
    shutil.rmtree(tmp_path / "epoch_3" / "opt_state")
    with Checkpoints(tmp_path) as checkpoints:
        found, damaged = checkpoints.latest(state_of(0))
        assert (found.epoch, damaged) == (2, [3])
        checkpoints.drop_after(found.epoch)
        assert checkpoints.epochs == [2]


def test_when_all_are_damaged_nothing_is_started_anew(tmp_path):
    save_all(tmp_path, [3.0])
    shutil.rmtree(tmp_path / "epoch_1" / "params")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match=r"none .* can be read \(epochs \[1\]"):
        checkpoints.latest(state_of(0))


def test_no_checkpoint_at_all(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest(state_of(0)) == (None, [])
        with pytest.raises(InputError, match="no checkpoint that can be read"):
            checkpoints.record()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save_all(tmp_path, [3.0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InputError, match="no room for the checkpoint of epoch 2"):
            checkpoints.save(2, state_of(2), {}, 1.0)
        assert checkpoints.epochs == [1]
