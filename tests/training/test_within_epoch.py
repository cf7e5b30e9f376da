"""A training that is stopped within an epoch goes on as if it had not been, bit for bit, and leaves no trace of it."""

from __future__ import annotations

import shutil
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError, Note, Stopped
from newllm_jax.training import checkpoint_folder, loss_scale
from newllm_jax.training.checkpoint import Checkpoints, every_few_epochs
from newllm_jax.training.clock import Clock
from newllm_jax.training.loop import Pieces, Training, fit
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.losses import Sums
from newllm_jax.training.manifest import Owner
from newllm_jax.training.split import Split
from newllm_jax.training.step import init_state, make_evaluation, make_updates, train_step
from newllm_jax.training.stopping import Stopping

pytestmark = pytest.mark.quick

QUIET = SimpleNamespace(progress=lambda *_: None, epoch=lambda _: None)
TIMES = {"seconds", "tokens_per_second"}
CONFIG = NewLLMConfig(num_epochs=2, patience=3, batch_size=2, save_minutes=1e-9)  # after every piece
ADAM = optax.adam(optax.exponential_decay(0.1, 5, 0.9))


def loss(params, batch, present, key, carry):
    """A parabola around each example, moved by dropout-like noise and by the batches before."""
    noise = 0 if key is None else jax.random.normal(key)
    losses = jnp.square(params["w"] - batch - noise - carry["mean"])
    after = {"mean": 0.5 * carry["mean"] + 0.1 * jnp.mean(batch)}
    return Sums(jnp.sum(losses, where=present), jnp.int32(0), jnp.sum(present)), after


TRAINING = Training(
    make_updates(partial(train_step, loss, ADAM, ema_decay=0.8)),
    make_evaluation(loss),
    optax.constant_schedule(1e-3),
    None,
)
CARRY = {"mean": jnp.zeros(())}
SPLIT = Split.from_arrays(jnp.arange(30.0), carry=CARRY)  # 15 updates an epoch


def train(folder: Path, config=CONFIG, asked=lambda: False, precision="fp32"):
    """Trains on in a folder of checkpoints: the last state, the history without times, what was told."""
    told = []
    state = init_state({"w": jnp.float32(5)}, ADAM, initial_loss_scale(precision), averaged=True, carry=CARRY)
    with Checkpoints(folder, Owner("a run", "stage_1"), every_few_epochs(config.checkpoint_every)) as checkpoints:
        stopping = Stopping(Clock(), Path("run"), config, asked)
        state, history = checkpoints.resume(state, config, stopping.clock, told.append)
        splits = {"train": SPLIT, "validation": SPLIT}
        state, history = fit(TRAINING, state, splits, config, checkpoints, QUIET, stopping, history)
    return state, [{name: each[name] for name in each.keys() - TIMES} for each in history], told


def after(looks: int):
    """Asks to stop at this look: there is one before each epoch and one after each of its pieces."""
    numbers = count(1)
    return lambda: next(numbers) >= looks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True, scope="module")
def pieces_of_six():
    """But the first, which is one update."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pieces, "learn", lambda self, elapsed, made: setattr(self, "size", 6))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of a training that was never stopped, and never saved within an epoch; and the names of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return (*train(folder, CONFIG.override({"save_minutes": None})), names(folder))


def assert_same(found, folder, whole):
    """The state and the history of a training, and its checkpoints, are those of another."""
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(whole[0]), strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()
    assert (found[1], names(folder)) == (whole[1], whole[3])


PLACES = [  # where a training that is stopped at each look goes on
    "", "within epoch 1, after update 1", "within epoch 1, after update 7", "within epoch 1, after update 13",
    "within epoch 1, after update 15", "after epoch 1", "within epoch 2, after update 6",
    "within epoch 2, after update 12",
]  # fmt: skip


@pytest.mark.parametrize("looks", [1, 3, 5, 6, 8])
def test_stopped_after_any_piece(tmp_path, whole, looks):
    with pytest.raises(Stopped):
        train(tmp_path, asked=after(looks))
    found = train(tmp_path)
    assert_same(found, tmp_path, whole)
    place = PLACES[looks - 1]
    assert found[2] == ([f"stage 1, continuing {place}"] if place else [])


def test_updates_that_are_skipped_are_counted_by_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**126)  # overflows at first
    whole = (*train(tmp_path / "whole", precision="fp16"), names(tmp_path / "whole"))
    assert whole[1][0]["skipped_updates"] > 0 == whole[1][1]["skipped_updates"]
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", asked=after(8), precision="fp16")
    found = train(tmp_path / "stopped", precision="fp16")
    assert found[2] == [f"stage 1, continuing {PLACES[7]}"]
    assert_same(found, tmp_path / "stopped", whole)


def test_a_stop_is_saved_before_its_minutes_are_over(tmp_path, whole):
    hour = CONFIG.override({"save_minutes": 60})
    with pytest.raises(Stopped):
        train(tmp_path, hour, after(3))
    assert names(tmp_path / "within_epoch") == ["epoch_1_update_7"]
    assert_same(train(tmp_path, hour), tmp_path, whole)


def test_one_that_is_saved_and_goes_on_is_the_same(tmp_path, whole):
    assert_same(train(tmp_path), tmp_path, whole)


def stop_within(folder: Path, looks: int = 3) -> Path:
    with pytest.raises(Stopped, match="--resume run continues"):
        train(folder, asked=after(looks))
    (saved,) = (folder / "within_epoch").iterdir()
    return saved


def test_a_damaged_one_costs_the_epoch_so_far(tmp_path, whole):
    saved = stop_within(tmp_path)
    for damaged in saved.rglob("*/d/*"):  # all, as some hold only what later ones of the same save replaced
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    with pytest.warns(Note, match="within epoch 1: .*; it begins again"):
        found = train(tmp_path)
    assert_same(found, tmp_path, whole)


def test_a_renamed_one_is_not_taken_for_another(tmp_path, whole):
    saved = stop_within(tmp_path)
    saved.rename(saved.with_name("epoch_1_update_14"))
    with pytest.warns(Note, match="it is of update"):
        assert_same(train(tmp_path), tmp_path, whole)


def test_what_a_killed_process_leaves_is_deleted(tmp_path, whole):
    saved = stop_within(tmp_path)
    for name in ("epoch_1_update_12.orbax-checkpoint-tmp", ".deleted-epoch_1_update_1"):
        saved.with_name(name).mkdir()
    saved.with_name("epoch_1_update_1").mkdir()  # written before, and not deleted yet
    assert_same(train(tmp_path), tmp_path, whole)


def test_one_of_an_epoch_that_is_over_is_not_used(tmp_path, whole):
    saved = stop_within(tmp_path / "early")
    with pytest.raises(Stopped):
        train(tmp_path / "later", CONFIG.override({"save_minutes": None}), after(6))
    (tmp_path / "later" / "within_epoch").mkdir()
    saved.rename(tmp_path / "later" / "within_epoch" / saved.name)
    found = train(tmp_path / "later")
    assert found[2] == ["stage 1, continuing after epoch 1"]
    assert_same(found, tmp_path / "later", whole)


def test_one_of_the_last_epoch_goes_when_the_training_is_over(tmp_path):
    stop_within(tmp_path)
    shutil.copytree(tmp_path / "within_epoch", tmp_path / "aside")
    train(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "within_epoch")  # as if killed between the last checkpoint and the deletion
    with Checkpoints(tmp_path, Owner("a run", "stage_1"), every_few_epochs(5)) as checkpoints:
        checkpoints.resume(init_state({"w": jnp.float32(5)}, ADAM), CONFIG, Clock(), lambda _: None)
    assert names(tmp_path) == ["epoch_1", "epoch_2"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(InputError, match="no room for the checkpoint within epoch 1"):
        train(tmp_path)


def test_no_minutes_no_checkpoint(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, CONFIG.override({"save_minutes": None}), after(3))
    assert not (tmp_path / "within_epoch").exists()
