"""The mirror of a run: the same files, each whole or absent, whatever happens while it is copied."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from newllm_jax.records import mirror, units
from newllm_jax.records.mirror import copy_run
from tests.records.mirror.runs import Followed, content, known, write, write_epoch

pytestmark = pytest.mark.quick


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
