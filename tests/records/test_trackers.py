"""Trackers: what reaches TensorBoard and Weights & Biases, and what happens where they are not installed."""

from __future__ import annotations

import struct
import sys
from types import SimpleNamespace

import pytest

from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir
from newllm_jax.records.trackers import NoTracker, open_tracker

ENTRIES = [{"epoch": 1, "val_loss": 3.5, "clip_norm": None}, {"epoch": 2, "val_loss": 3.25, "clip_norm": 1.0}]


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path, "mine")


def log_all(tracker):
    for entry in ENTRIES:
        tracker.log(entry)
    tracker.close()


def scalars(path):
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
    assert scalars(events) == [("val_loss", 1, 3.5), ("val_loss", 2, 3.25), ("clip_norm", 2, 1.0)]


def test_wandb(run, monkeypatch):
    said = []

    def init(**settings):
        said.append(settings)
        return SimpleNamespace(
            log=lambda entry, step: said.append((entry, step)), finish=lambda: said.append("finished")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    log_all(open_tracker("wandb", run, {"seed": 3}))
    assert said == [
        {"project": "newllm_jax", "id": run.path.name, "dir": str(run.path), "config": {"seed": 3}, "resume": "allow"},
        ({"val_loss": 3.5, "clip_norm": None}, 1),
        ({"val_loss": 3.25, "clip_norm": 1.0}, 2),
        "finished",
    ]


def test_wandb_that_cannot_start(run, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(InputError, match=r"tracker: wandb cannot start \(no API key\)"):
        open_tracker("wandb", run, {})


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_names_its_extra(run, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"tracker: {name} needs the extra newllm-jax\[{name}\]"):
        open_tracker(name, run, {})
