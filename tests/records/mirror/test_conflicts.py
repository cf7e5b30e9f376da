"""A mirror where something else is: another run, an earlier or a later state of this one, damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from newllm_jax.errors import InputError
from newllm_jax.records.mirror import Mirror, copy_run, fetch_run
from tests.records.mirror.runs import begun, content, epochs, follow, known, write, write_epoch

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("there", ["config.json", "thesis.txt", "checkpoints/epoch_3/params"])
@pytest.mark.parametrize("text", [json.dumps({"run_id": "b", "system": "new-llm"}), "", "[1]", "[" * 100_000])
def test_what_is_no_copy_of_the_run_is_left_alone(run, copy, there, text):
    write(copy / there, text)
    with pytest.raises(InputError, match="is there, and is no copy of this run; move it away"):
        follow(run, copy.parent)
    with pytest.raises(OSError, match="is there, and is no copy of this run"):
        copy_run(run, copy)
    assert content(copy) == {there: text}


@pytest.mark.parametrize("run_id", [{}, {"run_id": "a"}])
def test_a_model_folder_is_no_copy_of_a_run(run, copy, run_id):
    """Runs of version 0.1.0 have no identity, and neither has another's config.json."""
    write(run / "config.json", json.dumps({"system": "new-llm", "config": {"seed": 1}, **run_id}))
    for other in ({"model_type": "llama"}, {"system": "new-llm", "config": {"seed": 2}}):
        write(copy / "config.json", json.dumps(other))
        with pytest.raises(InputError, match="is no copy of this run"):
            follow(run, copy.parent)
    shutil.rmtree(copy)
    follow(run, copy.parent)
    follow(run, copy.parent)
    assert content(run) == content(copy)


def test_a_copy_whose_settings_are_damaged_is_known_by_their_copy(run, copy):
    shutil.copy(run / "config.json", run / "checkpoints" / "config.json")
    copy_run(run, copy)
    write(copy / "config.json", "")
    follow(run, copy.parent)
    assert content(run) == content(copy)


def test_a_copy_that_was_cut_short_at_its_first_file_goes_on(run, copy):
    shutil.copy(run / "config.json", run / "checkpoints" / "config.json")
    (copy / "checkpoints").mkdir(parents=True)
    write(copy / ".mirror" / "config.json", "half")
    follow(run, copy.parent)
    assert content(run) == content(copy)


def test_a_run_that_is_named_by_a_dot_has_its_copy_under_its_name(run, copy, monkeypatch):
    write(copy.parent / "thesis.txt", "years")
    monkeypatch.chdir(run)
    follow(Path(), copy.parent)
    assert content(copy) == content(run)
    assert (copy.parent / "thesis.txt").read_text() == "years"
    monkeypatch.chdir(run / "checkpoints")
    follow(Path(".."), copy.parent)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["some", "thesis.txt"]


@pytest.mark.parametrize("further", ["checkpoints", "checkpoints/stage_2"])
def test_a_copy_that_has_come_further_is_not_thrown_away(run, copy, further):
    copy_run(run, copy)
    write_epoch(copy, 45, folder=further)
    before = content(copy)
    with pytest.raises(InputError, match=r"has come further than .* \(to epoch 45\); move the latter away"):
        follow(run, copy.parent)
    assert content(copy) == before


def test_a_new_run_that_is_refused_a_mirror_has_no_settings_yet(tmp_path):
    write(tmp_path / "drive" / "mine" / "thesis.txt", "years")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(InputError, match="is no copy of this run"):
        follow(tmp_path / "runs" / "mine", tmp_path / "drive")


def test_what_the_run_lost_stays_in_the_copy_until_the_run_has_a_new_checkpoint(run, copy):
    copy_run(run, copy)
    assert epochs(copy) == ["10", "2", "9"]
    for lost in (run / "checkpoints" / "epoch_2", run / "checkpoints" / "epoch_9"):
        shutil.rmtree(lost)
    of_process = known(run)
    copy_run(run, copy, of_process)
    assert epochs(copy) == ["10", "2", "9"]
    write_epoch(run, 11)
    copy_run(run, copy, of_process)
    assert epochs(copy) == ["10", "11"]


@pytest.mark.parametrize("ends", ["finished", "stopped", "without results"])
def test_the_copy_of_a_finished_run_is_what_the_run_is(run, copy, ends):
    """A process that was killed may have deleted what the copy still has."""
    copy_run(run, copy)
    shutil.rmtree(run / "checkpoints" / "epoch_2")
    if ends != "without results":
        write(run / "results.json", "{}")
    with suppress(KeyboardInterrupt), Mirror(begun(run), str(copy.parent), lambda _: None, lambda _: None) as following:
        following.start()
        if ends == "stopped":
            raise KeyboardInterrupt
    assert epochs(copy) == (["10", "9"] if ends == "finished" else ["10", "2", "9"])


def test_a_training_that_ends_earlier_than_before_leaves_no_later_epochs(run, copy):
    copy_run(run, copy)
    of_process = known(run)
    for epoch in (9, 10):
        shutil.rmtree(run / "checkpoints" / f"epoch_{epoch}")
    write_epoch(run, 9, "on another device, where it stopped early")
    copy_run(run, copy, of_process)
    assert content(run) == content(copy)


def test_stages_that_the_run_deletes_stay_until_they_are_trained_again(run, copy):
    """That a stage follows another one is in its manifest, so none is taken for that of another."""
    for stage in (1, 2):
        write_epoch(run, 3, folder=f"checkpoints/stage_{stage}")
    of_process = known(run)
    copy_run(run, copy, of_process)
    shutil.rmtree(run / "checkpoints" / "stage_2")
    write_epoch(run, 4, folder="checkpoints/stage_1")
    copy_run(run, copy, of_process)
    assert (epochs(copy, "checkpoints/stage_1"), epochs(copy, "checkpoints/stage_2")) == (["3", "4"], ["3"])
    write_epoch(run, 1, folder="checkpoints/stage_2")
    copy_run(run, copy, of_process)
    assert content(run) == content(copy)


def test_checkpoints_within_epochs_go_when_the_run_is_past_them(run, copy):
    of_process = known(run)
    for update in (3, 5):
        write(run / "checkpoints" / "within_epoch" / f"epoch_11_update_{update}" / "totals", str(update))
        copy_run(run, copy, of_process)
        shutil.rmtree(run / "checkpoints" / "within_epoch" / "epoch_11_update_3", ignore_errors=True)
    copy_run(run, copy, of_process)
    assert [path.name for path in (copy / "checkpoints" / "within_epoch").iterdir()] == ["epoch_11_update_5"]
    shutil.rmtree(run / "checkpoints" / "within_epoch")
    write_epoch(run, 11)
    copy_run(run, copy, of_process)
    assert content(run) == content(copy)


def test_files_that_this_process_has_not_seen_in_the_run_stay(run, copy):
    copy_run(run, copy)
    write(copy / "tensorboard" / "events", "of an earlier process")
    write(run / "notes.txt", "for a while")
    write(run / "extraction" / "rows", "found and deleted")
    copy_run(run, copy)
    of_process = known(run)
    (run / "extraction" / "rows").unlink()
    copy_run(run, copy, of_process)
    (run / "notes.txt").unlink()
    copy_run(run, copy, of_process)
    assert content(copy) == content(run) | {"tensorboard/events": "of an earlier process"}


@pytest.mark.parametrize("damage", ["params", "manifest", "lost", "emptied"])
def test_a_damaged_checkpoint_does_not_replace_its_copy_and_one_trained_again_does(run, copy, damage):
    of_process = known(run)
    copy_run(run, copy, of_process)
    whole, checkpoint = content(copy), run / "checkpoints" / "epoch_9"
    if damage == "params":
        (checkpoint / "params" / "d" / "0").write_text("damaged")
    elif damage == "manifest":
        (checkpoint / "manifest" / "metadata").write_text('{"epoch": 9, "sha256": "another"}')
    elif damage == "lost":
        shutil.rmtree(checkpoint / "params")
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    with pytest.raises(OSError, match=r"checkpoints/epoch_9: the checkpoint or its copy is damaged, .*delete the"):
        copy_run(run, copy, of_process)
    assert content(copy) == whole
    shutil.rmtree(checkpoint)
    write_epoch(run, 9, "on another device")
    copy_run(run, copy, of_process)
    assert content(copy) == content(run)


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/epoch_9/params"])
def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(run, copy, place, monkeypatch):
    of_process = known(run)
    copy_run(run, copy, of_process)
    whole, scandir = content(copy), os.scandir

    def broken(path):
        if Path(path) in (run / place, copy / place):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", broken)
        with pytest.raises(OSError, match="Input/output error"):
            copy_run(run, copy, of_process)
        with pytest.raises(InputError, match=r"cannot be copied to .*Input/output error"):
            fetch_run(run.parent / "elsewhere" / run.name, str(copy.parent))
    assert content(copy) == whole
    assert not (run.parent / "elsewhere" / run.name).exists()


def test_nothing_is_written_or_read_through_a_link(run, copy, tmp_path):
    other = tmp_path / "other"
    write(other / "epoch_3" / "params", "not of the run")
    (run / "checkpoints" / "epoch_3").symlink_to(other / "epoch_3")
    (run / "linked").symlink_to(other)
    copy_run(run, copy)
    assert not (copy / "checkpoints" / "epoch_3").exists() and not (copy / "linked").exists()
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").symlink_to(other)
    with pytest.raises(OSError, match="checkpoints is a link"):
        copy_run(run, copy)
    assert content(other) == {"epoch_3/params": "not of the run"}
