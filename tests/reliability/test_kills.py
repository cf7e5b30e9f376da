"""A kill or two of those that `python -m tests.reliability.kills` counts, and that it would notice what goes wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.reliability import kills
from tests.reliability.tiny import CHECKOUT

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_a_run_that_is_killed_twice_goes_on_as_if_it_had_not_been(newllm, options, small_run, tmp_path):
    typed = [sys.executable, str(CHECKOUT / "train.py"), *options[1:], "--save_minutes", "1e-9"]
    assert kills.kill(typed, tmp_path, None, "checkpoints/within_epoch/*", 0.0)
    run = kills.only_run(tmp_path).relative_to(tmp_path)
    typed = [sys.executable, str(CHECKOUT / "train.py"), "--resume", str(run)]
    assert kills.kill(typed, tmp_path, None, "checkpoints/epoch_1", 0.0)
    code, out, err = newllm("train", "--resume", run)
    assert (code, err) == (0, "")
    assert "continuing " in out
    assert kills.difference(*({**kills.outcome(each), "results": results_of(each)} for each in (run, small_run))) == ""


def results_of(run: Path) -> dict:
    results = kills.constant(json.loads((run / "results.json").read_text()))
    return {name: results[name] for name in ("epochs", "test", "best", "data", "parameters")}


def test_what_differs_is_noticed(small_run, copy):
    whole = kills.outcome(small_run)
    assert kills.difference(kills.outcome(copy), whole) == ""
    (copy / "checkpoints" / ".deleted-epoch_1").mkdir()
    assert ".deleted-epoch_1" in kills.difference(kills.outcome(copy), whole)
    (copy / "checkpoints" / ".deleted-epoch_1").rmdir()
    lines = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines.replace('"val_loss": ', '"val_loss": 1'))
    assert kills.difference(kills.outcome(copy), whole) == "other metrics"
