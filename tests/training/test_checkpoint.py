"""Checkpoints: what is kept, what a damaged one costs, that arrays come back bit for bit."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.errors import InputError, Note
from newllm_jax.training import checkpoint_folder
from newllm_jax.training.average import Average
from newllm_jax.training.checkpoint import Checkpoints, every_few_epochs, read_chosen
from newllm_jax.training.loss_scale import LossScale, initial_loss_scale
from newllm_jax.training.manifest import Owner
from newllm_jax.training.step import init_state

pytestmark = pytest.mark.quick


def state_of(epoch: int):
    params = {"w": jnp.full((3, 2), epoch / 7, jnp.float32), "b": jnp.arange(4.0)}
    return init_state(params, optax.adam(optax.constant_schedule(1e-3)))


OWNER = Owner("a run")


def history_of(losses):
    return [{"val_loss": loss} for loss in losses]


def save_all(folder, losses, every=5, owner=OWNER, first=1, keep_first=False):
    """Saves the epochs from `first` on."""
    with Checkpoints(folder, owner, every_few_epochs(every, keep_first)) as checkpoints:
        for epoch in range(first, len(losses) + 1):
            checkpoints.save(epoch, state_of(epoch), history_of(losses[:epoch]), {"seconds": epoch / 2})
        checkpoints.wait()
        return checkpoints.epochs


def test_keeps_every_fifth_the_best_and_the_latest_two(tmp_path):
    losses = [5.0, 4.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert save_all(tmp_path, losses) == [3, 5, 10, 12, 13]
    losses = [5.0, 4.0, 3.0, 2.0, 2.5, 2.4, 2.4]
    assert save_all(tmp_path / "other", losses, every=100) == [4, 6, 7]
    assert save_all(tmp_path / "with the first", losses, every=100, keep_first=True) == [1, 4, 6, 7]


def test_checkpoints_of_an_earlier_process_are_deleted_too(tmp_path):
    losses = [3.0, 2.0, 2.5, 2.4, 2.3, 2.2]
    assert save_all(tmp_path, losses[:4], every=100) == [2, 3, 4]
    assert save_all(tmp_path, losses, every=100, first=5) == [2, 5, 6]


def test_what_a_killed_process_leaves_is_deleted(tmp_path):
    save_all(tmp_path, [3.0, 2.0])
    for name in ("epoch_3.orbax-checkpoint-tmp", ".deleted-epoch_1"):
        shutil.copytree(tmp_path / "epoch_2", tmp_path / name)
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        assert checkpoints.epochs == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1", "epoch_2"]


def test_a_deletion_that_is_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    save_all(tmp_path, [3.0, 2.0])

    def killed(_):
        raise KeyboardInterrupt

    with Checkpoints(tmp_path, OWNER) as checkpoints:
        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.keep_only([2])
        monkeypatch.undo()
        assert checkpoints.epochs == [2]


def test_of_equal_losses_the_first_epoch_is_kept(tmp_path):
    assert save_all(tmp_path, [5.0, 4.0, 4.0, 4.0, 4.0, 4.0], every=100) == [2, 5, 6]  # as `best_epoch` has it


def test_parameters_that_cannot_be_read_are_an_error_that_names_the_epoch(tmp_path):
    save_all(tmp_path, [3.0, 2.0])
    shutil.rmtree(tmp_path / "epoch_1" / "params")
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        for epoch in (1, 7):
            with pytest.raises(InputError, match=f"the checkpoint of epoch {epoch} cannot be used: it"):
                checkpoints.params(epoch, state_of(0).params)


def test_a_carry_and_an_average_are_parts_of_the_state(tmp_path):
    state = state_of(1).replace(
        carry={"context": jnp.arange(3.0)},
        ema=Average({"w": jnp.full((3, 2), 0.25), "b": jnp.arange(4.0)}, jnp.int32(7)),
    )
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        checkpoints.save(1, state, history_of([1.0]))
        checkpoints.wait()
        found, _ = checkpoints.latest(jax.tree.map(jnp.zeros_like, state))
        evaluated = checkpoints.params(1, state_of(0).params)
    assert (evaluated["w"] == 0.25).all()
    assert (read_chosen(tmp_path, OWNER, state_of(0).params)[1]["w"] == 0.25).all()
    flip(largest_file(tmp_path / "epoch_1" / "ema"))
    with pytest.raises(InputError, match="none of the checkpoints can be used"):
        read_chosen(tmp_path, OWNER, state_of(0).params)
    for left, right in zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True):
        assert (np.asarray(left) == np.asarray(right)).all()


def test_comes_back_bit_for_bit(tmp_path):
    save_all(tmp_path, [3.0, 2.0])
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        found, damaged = checkpoints.latest(state_of(0))
        record = {"seconds": 1.0, "history": history_of([3.0, 2.0])}
        assert (found.epoch, found.record, damaged) == (2, record, {})
        assert jax.tree.structure(found.state) == jax.tree.structure(state_of(2))
        for left, right in zip(jax.tree.leaves(found.state), jax.tree.leaves(state_of(2)), strict=True):
            assert (np.asarray(left) == np.asarray(right)).all()
        assert (checkpoints.params(1, state_of(0).params)["w"] == state_of(1).params["w"]).all()
        assert checkpoints.record() == record


def test_the_loss_scale_is_a_part_of_the_state(tmp_path):
    state = state_of(1).replace(loss_scale=LossScale(jnp.float32(2.0**11), jnp.int32(7), jnp.int32(4)))
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        checkpoints.save(1, state, history_of([1.0]))
        checkpoints.wait()
        found, _ = checkpoints.latest(state_of(0).replace(loss_scale=initial_loss_scale("fp16")))
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert jax.tree.leaves(found.state.loss_scale) == [2.0**11, 7, 4]


def test_what_comes_back_is_compiled_like_what_was_saved(tmp_path):
    compiled = jax.jit(lambda state: jax.tree.map(jnp.sin, state.params))
    compiled(state_of(1))
    save_all(tmp_path, [3.0])
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        found, _ = checkpoints.latest(state_of(0))
        compiled(found.state)
        compiled(state_of(0).replace(params=checkpoints.params(1, state_of(0).params)))
    assert compiled._cache_size() == 1


def flip(file, position=0.5):
    """One bit of a file."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 16
    file.write_bytes(content)


def swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside), other.rename(one), aside.rename(other)


def edit_manifest(folder, change):
    file = folder / "manifest" / "metadata"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def largest_file(folder):
    return max((file for file in folder.rglob("d/*")), key=lambda file: file.stat().st_size)


DAMAGES = {  # what happens to the checkpoint of epoch 3, of which 2 is no copy
    "no optimiser": (lambda at: shutil.rmtree(at / "opt_state"), "cannot be read"),
    "no manifest": (lambda at: shutil.rmtree(at / "manifest"), "its manifest is damaged"),
    "a bit of the manifest": (lambda at: flip(at / "manifest" / "metadata"), "its manifest is damaged"),
    "parameters of another epoch": (lambda at: swap(at / "params", at.with_name("epoch_2") / "params"), "params"),
    "another epoch by name": (lambda at: swap(at, at.with_name("epoch_2")), "another's: epoch 2, not 3"),
    "an edited loss": (lambda at: edit_manifest(at, lambda it: it["record"]["history"][1].update(val_loss=1.5)),
                       "does not fit its sha256"),
    "a shorter history": (lambda at: edit_manifest(at, lambda it: it["record"]["history"].pop()), "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_costs_one_epoch(tmp_path, damage):
    save_all(tmp_path, [3.0, 2.0, 2.5], every=1)
    shutil.copytree(tmp_path / "epoch_2", tmp_path / "whole")
    apply, said = DAMAGES[damage]
    apply(tmp_path / "epoch_3")
    shutil.rmtree(tmp_path / "epoch_2")
    shutil.move(tmp_path / "whole", tmp_path / "epoch_2")
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        found, damaged = checkpoints.latest(state_of(0))
        assert (found.epoch, list(damaged)) == (2, [3])
        assert said in damaged[3]
        for left, right in zip(jax.tree.leaves(found.state), jax.tree.leaves(state_of(2)), strict=True):
            assert (np.asarray(left) == np.asarray(right)).all()


def test_no_bit_of_an_array_is_read_as_another(tmp_path):
    save_all(tmp_path, [3.0, 2.0], every=1)
    kept = tmp_path / "whole"
    shutil.copytree(tmp_path / "epoch_2", kept)
    silent = []
    for file in sorted(path.relative_to(kept) for path in kept.rglob("d/*")):
        for position in np.linspace(0, 0.99, 6):
            shutil.copy(kept / file, tmp_path / "epoch_2" / file)
            flip(tmp_path / "epoch_2" / file, position)
            with Checkpoints(tmp_path, OWNER) as checkpoints:
                found, _ = checkpoints.latest(state_of(0))
            same = jax.tree.map(lambda a, b: bool((a == b).all()), found.state, state_of(found.epoch))
            silent += [] if all(jax.tree.leaves(same)) else [(file, position)]
        shutil.copy(kept / file, tmp_path / "epoch_2" / file)
    assert silent == []


def test_checkpoints_of_another_run_or_stage_are_refused(tmp_path):
    save_all(tmp_path, [3.0])
    for owner, said in (
        (Owner("another"), "run_id 'a run', not 'another'"), (Owner("a run", "stage_2"), "part ''"),
        (Owner("a run", after="other weights"), "after '', not 'other weights'"),
    ):  # fmt: skip
        with Checkpoints(tmp_path, owner) as checkpoints, pytest.raises(InputError, match=f"epoch 1: .*{said}"):
            checkpoints.latest(state_of(0))


def test_a_manifest_without_a_history_is_damaged(tmp_path):
    from newllm_jax.content import sealed

    save_all(tmp_path, [3.0, 2.0], every=1)
    file = tmp_path / "epoch_2" / "manifest" / "metadata"
    content = json.loads(file.read_text())
    del content["sha256"]
    for record in (None, [], {}, {"history": 3}):
        file.write_text(json.dumps(sealed({**content, "record": record})))
        with Checkpoints(tmp_path, OWNER) as checkpoints:
            found, damaged = checkpoints.latest(state_of(0))
        assert (found.epoch, damaged) == (1, {2: "its manifest has no record of the epochs before"})


def test_a_checkpoint_whose_best_is_lost_is_passed_over(tmp_path):
    save_all(tmp_path, [3.0, 4.0, 2.0, 5.0], every=1)
    shutil.rmtree(tmp_path / "epoch_3" / "params")
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        found, damaged = checkpoints.latest(state_of(0))
        assert (found.epoch, list(damaged)) == (2, [4, 3])
        assert damaged[4].startswith("the best one, of epoch 3: it cannot be read")
        found, _ = checkpoints.latest(state_of(0), needed=len)  # where the last parameters are those that count
        assert found.epoch == 4


def test_the_parameters_of_a_training_are_those_of_its_best_epoch(tmp_path):
    save_all(tmp_path, [3.0, 4.0, 2.0, 5.0], every=1)
    epoch, params, record = read_chosen(tmp_path, OWNER, state_of(0).params)
    assert (epoch, len(record["history"]), (params["w"] == state_of(3).params["w"]).all()) == (3, 4, True)
    flip(largest_file(tmp_path / "epoch_3" / "params"))
    with pytest.warns(Note, match="epoch 4: .*; epoch 3: .* the parameters of epoch 1 are used"):
        epoch, params, record = read_chosen(tmp_path, OWNER, state_of(0).params)
    assert (epoch, len(record["history"]), (params["w"] == state_of(1).params["w"]).all()) == (1, 2, True)
    with pytest.raises(InputError, match="has no checkpoint yet"):
        read_chosen(tmp_path / "nothing", OWNER, state_of(0).params)


def test_arrays_that_would_fill_the_memory_are_not_read(tmp_path):
    """A chunk is allocated before it is read, so that one of 2^50 numbers ends the process."""
    import tensorstore

    save_all(tmp_path, [3.0])
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/epoch_1/params/"}}
    files = tensorstore.KvStore.open(store).result()
    description = json.loads(files.read(b"w/.zarray").result().value)
    files.write(b"w/.zarray", json.dumps({**description, "chunks": [2**25, 2**25]}).encode()).result()
    with Checkpoints(tmp_path, OWNER) as checkpoints, pytest.raises(InputError, match="w is larger than it should be"):
        checkpoints.latest(state_of(0))


def test_memory_that_does_not_suffice_is_no_damage(tmp_path, monkeypatch):
    save_all(tmp_path, [3.0])

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(checkpoint_folder, "_unpinned", full)
    with Checkpoints(tmp_path, OWNER) as checkpoints, pytest.raises(MemoryError):
        checkpoints.latest(state_of(0))


def test_when_all_are_damaged_nothing_is_started_anew(tmp_path):
    save_all(tmp_path, [3.0])
    shutil.rmtree(tmp_path / "epoch_1" / "params")
    with (
        Checkpoints(tmp_path, OWNER) as checkpoints,
        pytest.raises(InputError, match="none of .* can be used: epoch 1: it"),
    ):
        checkpoints.latest(state_of(0))


def test_no_checkpoint_at_all(tmp_path):
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        assert checkpoints.latest(state_of(0)) == (None, {})
        assert checkpoints.record() == {}


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save_all(tmp_path, [3.0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with Checkpoints(tmp_path, OWNER) as checkpoints:
        with pytest.raises(InputError, match="no room for the checkpoint of epoch 2"):
            checkpoints.save(2, state_of(2), history_of([1.0, 1.0]))
        assert checkpoints.epochs == [1]
