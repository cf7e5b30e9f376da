"""The mirror of a run: the same files, each whole or absent, whatever happens while it is copied."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from newllm_jax.content import sealed
from newllm_jax.errors import InputError
from newllm_jax.files import read_json
from newllm_jax.records import mirror, units
from newllm_jax.records.directory import RunDir
from newllm_jax.records.mirror import Known, Mirror, copy_run, fetch_run

pytestmark = pytest.mark.quick


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def write_epoch(run: Path, epoch: int, text: str = "", folder: str = "checkpoints") -> None:
    checkpoint = run / folder / f"epoch_{epoch}"
    write(checkpoint / "manifest" / "metadata", json.dumps(sealed({"epoch": epoch, "text": text})))
    write(checkpoint / "params" / "d" / "0", f"{epoch} {text}")


def epochs(run: Path, folder: str = "checkpoints") -> list[str]:
    return sorted(
        path.name.removeprefix("epoch_") for path in (run / folder).glob("epoch_*") if "-tmp" not in path.name
    )


def begun(run: Path) -> RunDir:
    """A run as its process finds it."""
    file = run / "config.json"
    return RunDir(run, read_json(file) if file.exists() else {})


def known(run: Path) -> Known:
    """What a process knows that has just found a run."""
    return Known(mirror.stamps_of(run))


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(mirror, "SECONDS", 0.01)


@pytest.fixture
def run(tmp_path) -> Path:
    """A directory like that of a run."""
    folder = tmp_path / "runs" / "some"
    write(folder / "config.json", json.dumps({"run_id": "a", "system": "new-llm"}))
    write(folder / "metrics.jsonl", "{}\n")
    for epoch in (2, 9, 10):
        write_epoch(folder, epoch)
    write(folder / ".lock", "")
    write(folder / ".results.json.x1.json", "half of it")
    write(folder / "checkpoints" / "epoch_11.orbax-checkpoint-tmp" / "params", "half of it")
    return folder


@pytest.fixture
def copy(tmp_path) -> Path:
    return tmp_path / "drive" / "some"


def content(folder: Path) -> dict[str, str]:
    """What counts in a run directory."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = {path.relative_to(folder).as_posix(): path.read_text() for path in files}
    return {name: text for name, text in texts.items() if not name.startswith(".") and "-tmp" not in name}


class Followed(Mirror):
    """A mirror that remembers what it told, and lets a test wait for its next update."""

    def __init__(self, run, folder):
        self.told, self.updates = [], threading.Semaphore(0)
        super().__init__(begun(run), str(folder), self.told.append, lambda seconds: self.updates.release())
        self.start()

    def wait(self):
        assert self.updates.acquire(timeout=30)


def test_all_of_a_run_and_nothing_temporary_is_copied_and_what_is_pruned_goes(run, copy):
    copy_run(run, copy)
    assert content(run) == content(copy)
    assert not [path for path in copy.rglob("*") if path.name.startswith(".") or "-tmp" in path.name]

    shutil.rmtree(run / "checkpoints" / "epoch_2")
    write_epoch(run, 12)
    write_epoch(run, 10, "another")  # trained again
    write(run / "metrics.jsonl", "{}\n{}\n")
    copy_run(run, copy)
    assert content(run) == content(copy)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["epoch_10", "epoch_12", "epoch_9"]


def test_earlier_checkpoints_are_copied_before_later_ones_and_results_last(run, copy, monkeypatch):
    write(run / "results.json", "{}")
    order, copy_unit = [], mirror.copy_unit
    monkeypatch.setattr(mirror, "copy_unit", lambda a, b, c: (order.append(b.name), copy_unit(a, b, c)))
    copy_run(run, copy)
    assert order == ["config.json", "metrics.jsonl", "epoch_2", "epoch_9", "epoch_10", "results.json"]


@pytest.mark.parametrize("file", ["config.json", "params/d/0"])
def test_what_reads_back_as_something_else_gets_no_name(run, copy, monkeypatch, file):
    sha256 = units._sha256
    monkeypatch.setattr(units, "_sha256", lambda path: "wrong" if path.as_posix().endswith(file) else sha256(path))
    with pytest.raises(OSError, match="read back, it is not what was written"):
        copy_run(run, copy)
    assert not (copy / "config.json").exists() or not (copy / "checkpoints").exists()


def test_a_copy_that_is_killed_at_any_file_is_whole_up_to_there_and_goes_on(run, copy, monkeypatch):
    class Killed(BaseException):
        pass

    copy_file, whole = units._copy_file, content(run)
    for number in range(len(whole)):
        shutil.rmtree(copy, ignore_errors=True)
        done = []

        def killed(source, target, number=number, done=done):
            if len(done) == number:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text("half")
                raise Killed
            done.append(target)
            copy_file(source, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(units, "_copy_file", killed)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
            copy_run(run, copy)
        seen = content(copy)
        assert seen.items() <= whole.items()
        for checkpoint in (copy / "checkpoints").glob("*"):
            assert len([name for name in seen if f"/{checkpoint.name}/" in name]) == 2
        copy_run(run, copy)
        assert content(copy) == whole
        assert not (copy / mirror.PARTIAL).exists()


def test_nothing_has_its_name_before_it_is_whole(run, copy, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        copy_run(run, copy)
    assert content(copy) == {}


def test_a_checkpoint_that_is_pruned_while_it_is_copied_is_no_error(run, copy, monkeypatch):
    copy_file = units._copy_file

    def prune(source, target):
        if source.match("epoch_9/params/d/0"):
            shutil.rmtree(run / "checkpoints" / "epoch_9")
        copy_file(source, target)

    monkeypatch.setattr(units, "_copy_file", prune)
    copy_run(run, copy)
    assert content(run) == content(copy)


def test_a_checkpoint_that_is_pruned_between_two_of_its_files_is_not_copied_in_part(run, copy, monkeypatch):
    files, stamps = units._files, mirror.stamps_of(run)

    def prune(unit):
        found = files(unit)
        if unit == run / "checkpoints" / "epoch_9":
            unit.rename(unit.with_name(".deleted-epoch_9"))  # as it was looked through
            found = {}
        return found

    monkeypatch.setattr(mirror, "stamps_of", lambda _: stamps)
    monkeypatch.setattr(units, "_files", prune)
    copy_run(run, copy)
    assert content(run).keys() - content(copy).keys() == {
        "checkpoints/.deleted-epoch_9/manifest/metadata", "checkpoints/.deleted-epoch_9/params/d/0",
    }  # fmt: skip
    assert not (copy / "checkpoints" / "epoch_9").exists()


def test_a_look_that_fails_is_told_and_the_next_one_copies(run, copy, monkeypatch):
    stamps, looks = mirror.stamps_of, []

    def broken(folder):
        looks.append(folder)
        if len(looks) == 2:  # the first is that of the beginning
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return stamps(folder)

    monkeypatch.setattr(mirror, "stamps_of", broken)
    with Followed(run, copy.parent) as following:
        following.wait()
    assert "Permission denied" in following.told[0]
    assert content(run) == content(copy)


def test_what_is_copied_is_not_read_again(run, copy, monkeypatch):
    of_process = known(run)
    copy_run(run, copy, of_process)
    write_epoch(run, 12)
    read, sha256 = [], units._sha256
    monkeypatch.setattr(units, "_sha256", lambda path: (read.append(path), sha256(path))[1])
    copy_run(run, copy, of_process)
    assert len(read) == 2  # the files of one checkpoint
    shutil.rmtree(copy / "checkpoints" / "epoch_9")
    copy_run(run, copy, of_process)
    assert content(run) == content(copy)


def follow(run: Path, folder: Path) -> None:
    """A process that finds a run, copies it, and ends."""
    with Mirror(begun(run), str(folder), lambda _: None, lambda _: None) as following:
        following.start()


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


def test_what_is_new_is_copied_while_the_run_goes_on_and_the_last_before_it_ends(run, copy):
    with Followed(run, copy.parent) as following:
        following.wait()
        assert content(run) == content(copy)
        write_epoch(run, 12)
        following.wait()
        assert "checkpoints/epoch_12/params/d/0" in content(copy)
        mirror.SECONDS = 60
        write(run / "results.json", "{}")
    assert content(run) == content(copy)


def test_a_slow_mirror_does_not_slow_the_run(run, copy, monkeypatch):
    may_go_on, begun, copy_file = threading.Event(), threading.Event(), units._copy_file

    def slow(source, target):
        begun.set()
        assert may_go_on.wait(30)
        copy_file(source, target)

    monkeypatch.setattr(units, "_copy_file", slow)
    with Followed(run, copy.parent) as following:
        assert begun.wait(30)
        write_epoch(run, 12)  # what the run does while the first file is not copied yet
        assert content(copy) == {}
        may_go_on.set()
        following.wait()
    assert content(run) == content(copy)


def test_an_error_is_told_once_and_tried_again(run, copy, monkeypatch):
    copy_file, tries = units._copy_file, []

    def full(source, target):
        tries.append(source)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        copy_file(source, target)

    monkeypatch.setattr(units, "_copy_file", full)
    with Followed(run, copy.parent) as following:
        for epoch in (12, 13, 14):
            following.wait()
            write_epoch(run, epoch)
    (note,) = following.told
    said = " ".join(line.strip("| ") for line in note.splitlines())
    assert "mirror: " in said and "No space left on device" in said and "the run goes on" in said
    assert content(run) == content(copy)


def test_an_error_at_the_end_is_told(run, copy, monkeypatch):
    monkeypatch.setattr(mirror, "SECONDS", 60)
    monkeypatch.setattr(mirror, "copy_run", lambda *_: 1 / 0)
    with Followed(run, copy.parent) as following:
        pass
    assert len(following.told) == 1


def test_what_a_run_does_at_its_end_while_a_copy_is_under_way_is_copied_too(run, copy, monkeypatch):
    real, looked, ended = mirror.copy_run, threading.Event(), threading.Event()

    def slow(*arguments):
        real(*arguments)
        looked.set()
        assert ended.wait(30)

    monkeypatch.setattr(mirror, "SECONDS", 0.01)
    monkeypatch.setattr(mirror, "copy_run", slow)
    following = Followed(run, copy.parent)
    with following:
        assert looked.wait(30)
        write(run / "results.json", "the last")
        shutil.rmtree(run / "checkpoints" / "epoch_2")
        following._over.set()  # the run leaves while the copy is still under way
        ended.set()
    assert content(run) == content(copy)


def test_places_that_are_no_mirror(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "copy_run", lambda *_: pytest.fail("copied"))
    for folder in ("", str(run.parent), str(run.parent.parent / "runs")):
        with Mirror(begun(run), folder, lambda _: None, lambda _: None) as none:
            none.start()
            time.sleep(0.03)
    for folder in (str(run), str(run / "checkpoints")):
        with pytest.raises(InputError, match=f"mirror: {folder} lies in {run}"):
            Mirror(begun(run), folder, lambda _: None, lambda _: None)


def test_a_run_comes_back_whole_or_not_at_all(run, copy, monkeypatch):
    copy_run(run, copy)
    whole = content(run)
    shutil.rmtree(run)
    sha256 = units._sha256
    with monkeypatch.context() as patch, pytest.raises(InputError, match="mirror: .* cannot be copied to"):
        patch.setattr(units, "_sha256", lambda path: "wrong" if "epoch_10" in path.parts else sha256(path))
        fetch_run(run, str(copy.parent))
    assert not run.exists()
    fetch_run(run, str(copy.parent))
    assert content(run) == whole == content(copy)
    assert list(run.parent.iterdir()) == [run]
    write(run / "metrics.jsonl", "{}\n{}\n{}\n")
    fetch_run(run, str(copy.parent))  # it is there
    assert content(run) != whole


def test_without_a_mirror_no_run_comes_from_the_current_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    fetch_run(tmp_path / "elsewhere" / run.name, "")
    assert not (tmp_path / "elsewhere").exists()
