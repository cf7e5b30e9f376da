"""A mirror that follows a run while it goes on, and gives it back."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time

import pytest

from newllm_jax.errors import InputError
from newllm_jax.records import mirror, units
from newllm_jax.records.mirror import Mirror, copy_run, fetch_run
from tests.records.mirror.runs import Followed, begun, content, write, write_epoch

pytestmark = pytest.mark.quick


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
