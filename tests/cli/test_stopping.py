"""Runs that stop by themselves, or in a mirror, and go on: by the commands, and by the functions of the library."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path

import pytest

from newllm_jax import load_config, train_newllm
from newllm_jax.cascade.experiment import train_cascade
from newllm_jax.errors import Stopped
from newllm_jax.training.clock import Clock

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

TIMES = {"seconds", "tokens_per_second"}


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def timeless(content):
    """Without times."""
    if isinstance(content, dict):
        return {name: timeless(value) for name, value in content.items() if name not in TIMES}
    return [timeless(item) for item in content] if isinstance(content, list) else content


def after(looks: int):
    """Asks to stop at this look."""
    numbers = count(1)
    return lambda: next(numbers) >= looks


def test_a_run_with_a_time_limit_stops_before_it_and_goes_on(newllm, options, only_run, monkeypatch, small_run):
    seconds = count()
    monkeypatch.setattr(Clock, "since_start", lambda self: next(seconds))  # one between any two looks
    code, out, err = newllm(*options, "--num_epochs", "100", "--patience", "100", "--time_limit", "1m")
    run = only_run()
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"stopped     before the time limit of 1m; --resume {run} continues"
    assert 50 < next(seconds) < 60
    assert not (run / "results.json").exists()
    done = len((run / "metrics.jsonl").read_text().splitlines())
    code, out, err = newllm("train", "--resume", run, "--time_limit", "none", "--num_epochs", done + 1)
    assert (code, err) == (0, "")
    assert f"continuing after epoch {done}" in out
    assert len(results_of(run)["epochs"]) == done + 1


def test_a_run_comes_back_from_its_mirror(newllm, refused, options, small_run, tmp_path):
    code, out, err = newllm(*options, "--num_epochs", "1", "--mirror", "drive", "--run_root", "first")
    assert (code, err) == (0, "")
    (run,) = Path("first").iterdir()
    copied = {path.relative_to("drive") for path in Path("drive").rglob("*") if path.is_file()}
    assert copied == {
        path.relative_to("first") for path in Path("first").rglob("*") if path.is_file() and path.name != ".lock"
    }
    shutil.rmtree("first")
    assert refused("train", "--resume", run) == f"{run}: no such run directory"
    code, out, err = newllm("train", "--resume", run, "--mirror", "drive", "--num_epochs", 2)
    assert (code, err) == (0, "")
    assert "continuing after epoch 1" in out
    assert timeless(results_of(run)["epochs"]) == timeless(results_of(small_run)["epochs"])
    assert results_of(Path("drive") / run.name) == results_of(run)
    code, out, err = newllm("train", "--resume", f"drive/{run.name}", "--num_epochs", 3)  # it is a run directory
    assert (code, err) == (0, "")
    assert len(results_of(Path("drive") / run.name)["epochs"]) == 3
    assert len(results_of(run)["epochs"]) == 2


@pytest.mark.filterwarnings("always::newllm_jax.errors.Note")
def test_a_mirror_is_asked_for_anew(newllm, options, only_run, tmp_path):
    """What a stranger's run directory names would be any folder of the user."""
    newllm(*options, "--num_epochs", "1", "--mirror", "drive")
    run = only_run()
    shutil.rmtree("drive")
    code, _, err = newllm("train", "--resume", run, "--num_epochs", 2)
    assert (code, err) == (0, f"note: {run} had a mirror in drive; --mirror keeps it up to date\n")
    assert not Path("drive").exists()


def test_a_mirror_that_cannot_be_written_stops_nothing(newllm, options, only_run, small_run):
    Path("drive").write_text("a file")
    code, out, err = newllm(*options, "--mirror", "drive")
    assert (code, err) == (0, "")
    assert "| mirror: drive/baseline-" in out
    assert results_of(only_run())["test"] == results_of(small_run)["test"]


def test_the_library_stops_where_its_caller_says(small, small_run):
    config = load_config("baseline", small).override({"save_minutes": 1e-9})
    told = []
    with pytest.raises(Stopped, match="--resume runs/newllm-"):
        train_newllm(config, narrate=told.append, stop=after(3))
    (run,) = Path("runs").iterdir()
    again = train_newllm(resume=run, narrate=told.append).results
    assert any(line.startswith("continuing within epoch 1, after update ") for line in told)
    assert timeless(again["epochs"]) == timeless(results_of(small_run)["epochs"])
    assert again["test"] == results_of(small_run)["test"]
    assert not (run / "checkpoints" / "within_epoch").exists()


def test_cascade_stops_in_each_of_its_phases(tiny):
    config = tiny.override({"num_stages": 2, "num_epochs": 2, "save_minutes": 1e-9})
    whole = train_cascade(config, run_root="whole", narrate=lambda _: None).results
    phases, told = set(), []
    with pytest.raises(Stopped):
        train_cascade(config, stop=after(3), narrate=told.append)
    (run,) = Path("runs").iterdir()
    for looks in (7, 12):
        told.clear()
        with pytest.raises(Stopped):
            train_cascade(resume=run, stop=after(looks), narrate=told.append)
        phases |= {line.split(" after")[0] for line in told if "continuing" in line}
    again = train_cascade(resume=run, narrate=told.append).results
    phases |= {line.split(" after")[0] for line in told if "continuing" in line}
    assert {key: timeless(again[key]) for key in ("base", "stages", "ensemble")} == {
        key: timeless(whole[key]) for key in ("base", "stages", "ensemble")
    }
    assert len(phases) > 1, phases
    names = [sorted(path.name for path in Path(root).rglob("checkpoints/**/*")) for root in ("whole", "runs")]
    assert [name for name in names[0] if "epoch" in name] == [name for name in names[1] if "epoch" in name]
