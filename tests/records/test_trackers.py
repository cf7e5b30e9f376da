"""Trackers: what reaches TensorBoard, Weights & Biases and Trackio, and what happens where they are not installed."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir
from newllm_jax.records.trackers import PACKAGES, NoTracker, check_tracker, open_tracker, scalars

ENTRIES = [{"epoch": 1, "val_loss": 3.5, "clip_norm": None}, {"epoch": 2, "val_loss": 3.25, "clip_norm": 1.0}]


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path, "mine")


def log_all(tracker):
    for entry in ENTRIES:
        tracker.log(entry)
    tracker.close()


def written_scalars(path):
    """The (tag, step, value) of a TensorBoard event file: length-delimited records of protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[12 + length + 4 :]
    return found


def test_none(run):
    tracker = open_tracker("none", run, {})
    assert isinstance(tracker, NoTracker)
    log_all(tracker)
    assert list(run.path.iterdir()) == []


@pytest.mark.quick
def test_tensorboard(run):
    pytest.importorskip("tensorboardX", reason="the extra newllm-jax[tensorboard] is not installed")
    log_all(open_tracker("tensorboard", run, {}))
    (events,) = (run.path / "tensorboard").iterdir()
    assert written_scalars(events) == [("val_loss", 1, 3.5), ("val_loss", 2, 3.25), ("clip_norm", 2, 1.0)]


INIT = {
    "wandb": lambda run: {"id": run.path.name, "dir": str(run.path)},
    "trackio": lambda run: {"name": run.path.name, "embed": False, "auto_log_gpu": False, "auto_log_cpu": False},
}


@pytest.mark.parametrize("name", INIT)
def test_a_service_is_told_all_finite_numbers_under_the_name_of_the_run(run, monkeypatch, capsys, name):
    said = []

    def init(**settings):
        print("a line of the service")
        said.append(settings)
        return SimpleNamespace(
            log=lambda entry, step: said.append((entry, step)), finish=lambda: said.append("finished")
        )

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    log_all(open_tracker(name, run, {"seed": 3}))
    assert said == [
        {"project": "newllm_jax", "config": {"seed": 3}, "resume": "allow", **INIT[name](run)},
        ({"val_loss": 3.5}, 1),
        ({"val_loss": 3.25, "clip_norm": 1.0}, 2),
        "finished",
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", INIT)
def test_a_service_that_cannot_start(run, monkeypatch, name):
    def init(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    with pytest.raises(InputError, match=rf"tracker: {name} cannot start \(no API key\)"):
        open_tracker(name, run, {})


def test_names_and_values_of_metrics():
    entry = {"epoch": 4, "val_loss": 2.5, "val_ppl": float("inf"), "clip_norm": None, "stage_1/grad_norm": 0.0}
    assert scalars(entry) == {"val_loss": 2.5, "stage_1/grad_norm": 0.0}


REAL = """
import sys
from pathlib import Path
from newllm_jax.records.directory import RunDir
from newllm_jax.records.trackers import open_tracker
run = RunDir(Path(sys.argv[2]), {})
for epoch in (1, 2), (3,):  # the second time as a resumed run
    tracker = open_tracker(sys.argv[1], run, {"seed": 3})
    for number in epoch:
        tracker.log({"epoch": number, "val_loss": number / 2, "clip_norm": None})
    tracker.close()
"""


def log_for_real(run, name, **environment):
    """Logs three epochs with the package itself, in a process of its own that is started anew."""
    pytest.importorskip(name, reason=f"the extra newllm-jax[{name}] is not installed")
    command = [sys.executable, "-c", REAL, name, str(run.path)]
    ran = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_trackio_for_real(run, tmp_path):
    log_for_real(run, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "newllm_jax.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step, json.loads(metrics)) for name, step, metrics in rows] == [
        (run.path.name, step, {"val_loss": step / 2}) for step in (1, 2, 3)
    ]


def test_wandb_for_real(run):
    log_for_real(run, "wandb", WANDB_MODE="offline")
    assert len(list((run.path / "wandb").glob(f"offline-run-*-{run.path.name}"))) >= 1


@pytest.mark.parametrize(("name", "module"), list(PACKAGES.items()))
def test_a_tracker_that_is_not_installed_names_its_extra(run, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"tracker: {name} needs the extra newllm-jax\[{name}\]"):
        open_tracker(name, run, {})
    with pytest.raises(InputError, match=rf"tracker: {name} needs the extra newllm-jax\[{name}\]"):
        check_tracker(name)
