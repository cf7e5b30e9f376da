"""Fixtures of the tests of mirrors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from newllm_jax.records import mirror
from tests.records.mirror.runs import write, write_epoch


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
