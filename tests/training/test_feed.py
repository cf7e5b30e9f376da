"""Blocks of batches out of files: the examples of a split on the device, in the same places, whatever the blocks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import Stopped
from newllm_jax.training import feed as feeds
from newllm_jax.training.checkpoint import Checkpoints, every_few_epochs
from newllm_jax.training.clock import Clock
from newllm_jax.training.feed import WHOLE, BatchSource, FileFeed, Share, evaluate_in_blocks, make_split, open_feed
from newllm_jax.training.loop import Training, evaluate, fit
from newllm_jax.training.losses import Sums
from newllm_jax.training.manifest import Owner
from newllm_jax.training.split import Split, epoch_order, take
from newllm_jax.training.step import init_state, make_evaluation, make_updates, train_step
from newllm_jax.training.stopping import Stopping

pytestmark = pytest.mark.quick

B, EXAMPLES = 4, 30  # 8 batches, of which the last has two places that are empty


@pytest.fixture
def rows(tmp_path) -> dict[str, np.ndarray]:
    """A tree of arrays in files."""
    random, arrays = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, array in (("x", random.normal(size=(EXAMPLES, 3)).astype("f4")), ("id", np.arange(EXAMPLES, dtype="u2"))):
        np.save(tmp_path / f"{name}.npy", array)
        arrays[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    return arrays


def batches_of_blocks(monkeypatch, updates: int, rows, start=0, share=WHOLE) -> list[np.ndarray]:
    """The `id` of every batch from `start` on, -1 where absent, out of blocks of so many updates."""
    monkeypatch.setattr(feeds, "BLOCK_BYTES", updates * B * 14 + 1)
    found = []
    with FileFeed(rows, epoch_order(5, 1, EXAMPLES), B, start, share) as feed:
        assert feed.capacity == min(updates, 8)
        for step in range(start, feed.steps):
            assert feed.block(step) is feed.block(step)
            data, order = feed.block(step)
            batch, present = take(data, order[step])
            assert len(data["id"]) == feed.capacity * len(share.places(B))
            for which in np.flatnonzero(present):
                assert np.array_equal(batch["x"][which], rows["x"][batch["id"][which]])
            found.append(np.where(present, np.asarray(batch["id"], np.int32), -1))
    return found


@pytest.mark.parametrize("updates", [1, 3, 8, 100])
@pytest.mark.parametrize("start", [0, 2, 6, 8])
def test_blocks_hold_the_batches_of_the_epoch_from_where_it_is_resumed(monkeypatch, rows, updates, start):
    expected = np.asarray(Split.from_arrays(dict(rows)).shuffled(B, 5, 1))[start:]
    found = batches_of_blocks(monkeypatch, updates, rows, start)
    assert np.array_equal(np.reshape(found, (-1, B)), expected)


def test_reading_starts_at_the_update_that_is_asked_for(monkeypatch, rows):
    read, get = list[int](), BatchSource.__getitem__
    monkeypatch.setattr(BatchSource, "__getitem__", lambda self, step: (read.append(step), get(self, step))[1])
    batches_of_blocks(monkeypatch, 3, rows, 5)
    assert sorted(read) == [5, 6, 7]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_parts_of_processes_are_disjoint_and_together_the_batch(monkeypatch, rows, count):
    whole = np.stack(batches_of_blocks(monkeypatch, 3, rows))
    parts = [np.stack(batches_of_blocks(monkeypatch, 3, rows, 0, Share(index, count))) for index in range(count)]
    assert np.array_equal(np.concatenate(parts, 1), whole)
    assert max(part.shape[1] for part in parts) - min(part.shape[1] for part in parts) <= 1
    ids = np.concatenate([part.ravel() for part in parts])
    assert sorted(ids[ids >= 0]) == list(range(EXAMPLES))


def test_the_setting_chooses_and_auto_by_the_memory(monkeypatch, rows):
    assert make_split(rows, "files").in_files and not make_split(rows, "device").in_files
    size = sum(array.nbytes for array in rows.values())
    for free, expected in ((16 * size, False), (16 * size - 1, True), (None, False)):
        monkeypatch.setattr(feeds, "device_memory", lambda free=free: ("a device", free))
        assert make_split(rows, "auto").in_files is expected


def test_what_the_device_holds(monkeypatch, rows):
    whole = feeds.held(rows, "device", B)
    assert (whole.data["x"].shape, whole.updates, whole.size) == ((30, 3), 8, 30 * 14)
    monkeypatch.setattr(feeds, "BLOCK_BYTES", 3 * B * 14)
    block = feeds.held(rows, "files", B)
    assert (block.data["x"].shape, block.updates, block.size) == ((12, 3), 3, 2 * 12 * 14)


def loss(params, batch, present, key, carry):
    """A parabola around each example, with noise."""
    noise = 0.0 if key is None else jax.random.normal(key, batch["x"].shape)
    away = jnp.sum(jnp.square(params["w"] + noise - batch["x"]), 1) * (1 + batch["id"])
    return Sums(jnp.sum(away, where=present), jnp.int32(0), jnp.sum(present)), carry


ADAM = optax.adam(1e-2)
TRAINING = Training(
    make_updates(partial(train_step, loss, ADAM)), make_evaluation(loss), optax.constant_schedule(1e-2), None
)


def test_an_evaluation_has_the_same_bits(monkeypatch, rows):
    params = {"w": jnp.float32([1, 2, 3])}
    expected = evaluate(TRAINING.evaluate, params, Split.from_arrays(rows), B)
    for updates in (1, 3, 100):
        monkeypatch.setattr(feeds, "BLOCK_BYTES", updates * B * 14)
        assert evaluate(TRAINING.evaluate, params, Split.from_file(rows), B) == expected
    assert evaluate_in_blocks(TRAINING.evaluate, params, Split.from_file(rows), B).count == EXAMPLES


def fitted(folder: Path, split: Split, epochs: int, stop_after: int | None = None):
    """A run of some epochs, which may stop when it was asked so often whether to: its parameters and losses."""
    config = NewLLMConfig(num_epochs=epochs, batch_size=B, save_minutes=1000.0, minimum_gain=0.0)
    asked = iter(range(10**6))
    stop = lambda: stop_after is not None and next(asked) >= stop_after  # noqa: E731
    observer = SimpleNamespace(progress=lambda *_: None, epoch=lambda _: None)
    clock = Clock()
    with Checkpoints(folder, Owner("a run", "stage_1"), every_few_epochs(5)) as checkpoints:
        state = init_state({"w": jnp.float32([5, 6, 7])}, ADAM)
        state, history = checkpoints.resume(state, config, clock, lambda _: None)
        splits, stopping = {"train": split, "validation": split}, Stopping(clock, folder, config, stop)
        state, history = fit(TRAINING, state, splits, config, checkpoints, observer, stopping, history)
    losses = [(entry["train_loss"], entry["val_loss"], entry["grad_norm"]) for entry in history]
    return np.asarray(state.params["w"]).tobytes(), losses


def test_a_training_has_the_same_bits_stopped_within_an_epoch_too(monkeypatch, tmp_path, rows):
    monkeypatch.setattr(feeds, "BLOCK_BYTES", 3 * B * 14)
    whole = fitted(tmp_path / "device", Split.from_arrays(rows), 2)
    files = Split.from_file(rows)
    assert fitted(tmp_path / "files", files, 2) == whole
    with monkeypatch.context() as patch:
        patch.setattr(feeds, "BLOCK_BYTES", 1)
        assert fitted(tmp_path / "one", files, 2) == whole
    starts = list[int]()
    monkeypatch.setattr(feeds, "read_batches", lambda source, start, capacity, read=feeds.read_batches: (
        starts.append(start), read(source, start, capacity)
    )[1])  # fmt: skip
    for stop_after in (2, 5):
        folder = tmp_path / str(stop_after)
        with pytest.raises(Stopped):
            fitted(folder, files, 2, stop_after)
        assert fitted(folder, files, 2) == whole
    assert any(start % 8 for start in starts)  # so an epoch was resumed from its middle


def test_a_damaged_reading_ends_the_training_and_its_threads(monkeypatch, rows):
    def broken(self, step):
        raise OSError("the disk is gone")

    monkeypatch.setattr(BatchSource, "__getitem__", broken)
    with pytest.raises(OSError, match="the disk is gone"), open_feed(Split.from_file(rows), B, 0, 1) as feed:
        feed.block(0)
