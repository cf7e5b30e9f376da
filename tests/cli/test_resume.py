"""`newllm train --resume`: nothing is lost whatever stops a run, and it goes on as the same experiment only."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from newllm_jax.files import whole_file
from newllm_jax.records import directory as run_dir
from newllm_jax.training import loop

CHECKOUT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def epochs(run):
    return [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# Resuming that contradicts


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--batch_size", "8"], "batch_size: copy was trained with 32, not 8; a new run can have that"),
        (["--learning_rate", "1e-4"], "learning_rate: copy was trained with "),
        (["--config", "advanced"], "was trained with"),
        (["--seed", "1"], "seed: copy was trained with 0, not 1"),
        (["--precision", "fp16"], "precision: copy was trained with 'auto', not 'fp16'; a new run can have that"),
    ],
)
def test_resuming_cannot_make_it_another_experiment(refused, copy, typed, message):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert message in refused("train", "--resume", "copy", *typed)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_resuming_on_other_texts_is_refused(refused, copy, tmp_path, corpus):
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text().replace("w1 ", "w2 "))
    line = refused("train", "--resume", copy, "--dataset", other, "--num_epochs", "3")
    assert f"dataset: {other} is not what the run was trained on" in line
    assert epochs(copy) == [1, 2]


def test_resuming_a_finished_run_says_what_would_let_it_go_on(newllm, copy):
    code, out, err = newllm("train", "--resume", copy)
    assert (code, err) == (0, "")
    assert "finished after epoch 2, the last of num_epochs (raise it to continue)" in out


# What stops a run, and going on after it


@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.usefixtures("ctrl_c")
def test_signals_and_a_run_in_use(refused, newllm, only_run, options, sent, code, word):
    forever = ["--num_epochs", "30000", "--patience", "30000", "--checkpoint_every", "30000"]
    command = [sys.executable, str(CHECKOUT / "train.py"), *options[1:], *forever]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                break
        run = only_run()
        assert refused("train", "--resume", run) == f"{run}: in use by another running process"
        assert refused("report", run) == f"{run}: has no results.json"
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (code, 1), err
    assert err == f"error: {word}; --resume {run} continues\n"

    done = max(int(name.name.split("_")[1]) for name in (run / "checkpoints").glob("epoch_*"))
    assert done >= 1
    code, out, err = newllm("train", "--resume", run, "--num_epochs", done + 1)
    assert (code, err) == (0, "")
    assert f"continuing after epoch {done}" in out
    assert epochs(run) == list(range(1, done + 2))


def test_numbers_that_fail(refused, newllm, only_run, options):
    line = refused(*options, "--learning_rate", "1e30", "--run_root", "first", code=3)
    assert line == (
        "epoch 1: the loss of update 2 of 8 is not finite; there is no checkpoint yet; try a new run with a lower "
        "learning_rate or lower clip_norms"
    )

    evaluate, calls = loop.evaluate, []

    def fails_the_second_time(*arguments):
        calls.append(arguments)
        return {"loss": float("nan")} if len(calls) == 2 else evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", fails_the_second_time)
        line = refused(*options, code=3)
    assert line.startswith("epoch 2: the validation loss is not finite; the checkpoint of epoch 1 is kept")
    run = only_run()
    assert epochs(run) == [1]
    assert newllm("train", "--resume", run)[0] == 0
    assert epochs(run) == [1, 2]


def fail_file(name):
    @contextmanager
    def full(path):
        with whole_file(path) as partial:
            yield partial
            if path.name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda patch: patch.setattr(run_dir, "whole_file", full)


def fail_metrics(patch):
    append = run_dir.RunDir.append_metrics

    def full(self, entry):
        if entry["epoch"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / "metrics.jsonl"))
        append(self, entry)

    patch.setattr(run_dir.RunDir, "append_metrics", full)


def fail_room(patch):
    room = iter([shutil.disk_usage("/"), shutil.disk_usage("/")._replace(free=1000)])
    patch.setattr("newllm_jax.training.checkpoint_folder.shutil.disk_usage", lambda _: next(room))


def fail_orbax(method, times):
    def patched(patch):
        original, calls = getattr(ocp.AsyncCheckpointer, method), []

        def full(self, *arguments, **named):
            calls.append(arguments)
            if len(calls) == times:
                raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")
            return original(self, *arguments, **named)

        patch.setattr(ocp.AsyncCheckpointer, method, full)

    return patched


FULL_DISKS = {
    "results": (fail_file("results.json"), "results.json: No space left on device; make room or choose another"),
    "metrics": (fail_metrics, "metrics.jsonl: No space left on device; make room or choose another place (what was"),
    "room": (
        fail_room,
        "checkpoints: no room for the checkpoint of epoch 2 (0.0 MB needed, 0.0 MB free); make room and",
    ),
    "save": (fail_orbax("save", 2), "checkpoints: No space left on device; the checkpoints up to epoch 1 are whole;"),
    "wait": (fail_orbax("wait_until_finished", 4), "checkpoints: No space left on device; the checkpoints up to"),
}


@pytest.mark.parametrize("place", FULL_DISKS)
def test_a_full_disk_and_going_on_when_there_is_room(refused, newllm, only_run, options, small_run, place):
    fill_disk, message = FULL_DISKS[place]
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        assert message in refused(*options)
    run = only_run()
    assert epochs(run) in ([1], [1, 2])
    assert not (run / "results.json").exists()
    code, _, err = newllm("train", "--resume", run)
    assert (code, err) == (0, "")
    ours, whole = (json.loads((path / "results.json").read_text()) for path in (run, small_run))
    assert epochs(run) == [1, 2]
    assert ours["test"] == whole["test"]  # as if the disk had never been full


def test_a_disk_that_takes_nothing_leaves_nothing(refused, options, monkeypatch, tmp_path):
    fail_file("config.json")(monkeypatch)
    assert "config.json: No space left on device" in refused(*options)
    assert list((tmp_path / "runs").iterdir()) == []

    def read_only(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    line = refused(*options, "--run_root", "elsewhere")
    assert line.startswith("elsewhere/baseline-") and ": Read-only file system; make room or choose another" in line
