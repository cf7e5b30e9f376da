"""Runs of version 0.1.0 are restored, measured, reported and resumed; `data/README.md` tells how they were made."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

import newllm_jax
from newllm_jax.systems import evaluate

pytestmark = pytest.mark.quick

COMMANDS = {"newllm": "train", "cascade_best": "cascade", "cascade_last": "cascade", "finetune": "finetune"}
GO_ON = {
    "newllm": ("--num_epochs", 6),
    "cascade_best": ("--num_stages", 3),
    "cascade_last": ("--num_stages", 2),
    "finetune": ("--num_epochs", 6),
}
# Rounding differs between the versions and between CPUs, and training magnifies it.
SAME_TRAINING, SAME_PARAMETERS = {"rel": 1e-3}, {"rel": 1e-5}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("version_0_1_0")
    with tarfile.open(Path(__file__).parent / "data" / "runs_0_1_0.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture
def runs(archive, in_an_empty_folder, tmp_path) -> Path:
    """The current folder, with a copy of the archive: the runs name their sources by relative paths."""
    shutil.copytree(archive, tmp_path, dirs_exist_ok=True)
    return tmp_path


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def trainings(results: dict) -> list[dict]:
    """What has epochs, a best and a last one: the stages of CASCADE, else the run itself."""
    return results.get("stages") or [results]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_archive_can_tell_the_best_epoch_from_the_last(archive, name):
    results = results_of(archive / name)
    for training in trainings(results):
        losses = [entry["val_loss"] for entry in training["epochs"]]
        assert losses.index(min(losses)) + 1 == training["best"]["epoch"] < len(losses)
        assert losses[-1] > min(losses) * (1 + 1e-3)


@pytest.mark.parametrize("name", COMMANDS)
def test_restored_parameters_are_those_that_were_measured(runs, newllm, name):
    recorded = results_of(runs / name)
    measured = evaluate(name)
    code, out, err = newllm("evaluate", name)
    assert code == 0, err
    if recorded["system"] == "cascade":
        for now, before in zip(measured["ensemble"], recorded["ensemble"], strict=True):
            assert now["val_loss"] == pytest.approx(before["val_loss"], **SAME_PARAMETERS)
            assert now["exit_rates"] == pytest.approx(before["exit_rates"], abs=0.005)  # a token at a threshold
            assert f"{before['val_loss']:.4f}" in out
        return
    assert newllm_jax.restore(name).epoch == recorded["best"]["epoch"]
    assert measured["validation"]["loss"] == pytest.approx(recorded["best"]["val_loss"], **SAME_PARAMETERS)
    if recorded["system"] == "new-llm":
        assert measured["test"]["loss"] == pytest.approx(recorded["test"]["loss"], **SAME_PARAMETERS)
    assert json.loads(out) == measured


@pytest.mark.parametrize("name", COMMANDS)
def test_the_report_is_written(runs, newllm, name):
    (runs / name / "report.md").unlink()
    code, out, err = newllm("report", name)
    assert code == 0, err
    results, report = results_of(runs / name), (runs / name / "report.md").read_text()
    assert report in out
    assert results["command"] in report
    for training in trainings(results):
        assert f"{training['best']['val_ppl']:.2f}" in report
    assert (runs / name / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("name", COMMANDS)
def test_resuming_a_finished_run_writes_the_report_that_it_lacks(runs, newllm, name):
    report = runs / name / "report.md"
    report.unlink()
    code, out, err = newllm(COMMANDS[name], "--resume", name)
    assert (code, err) == (0, "")
    assert "finished" in out
    assert results_of(runs / name)["command"] in report.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_going_on_is_what_version_0_1_0_would_have_done(runs, newllm, name):
    before, expected = results_of(runs / name), json.loads(Path("went_on.json").read_text())[name]
    code, out, err = newllm(COMMANDS[name], "--resume", name, *GO_ON[name])
    assert code == 0, err + out
    after = results_of(runs / name)
    stages = expected["stages"] if after["system"] == "cascade" else [expected]
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == sum(map(len, stages))
    for training, losses in zip(trainings(after), stages, strict=True):
        assert [entry["val_loss"] for entry in training["epochs"]] == pytest.approx(losses, **SAME_TRAINING)
        assert training["best"]["epoch"] == losses.index(min(losses)) + 1
    for old, new in zip(trainings(before), trainings(after), strict=False):
        assert new["epochs"][: len(old["epochs"])] == old["epochs"]  # to the last bit, and with its times
    if after["system"] == "cascade":
        losses = [entry["val_loss"] for entry in after["ensemble"]]
        assert losses == pytest.approx(expected["ensemble"], **SAME_TRAINING)
    if after["system"] == "new-llm":
        assert evaluate(name)["test"]["loss"] == pytest.approx(after["test"]["loss"], **SAME_PARAMETERS)
    assert after["seconds"] > before["seconds"]


@pytest.mark.parametrize("name", COMMANDS)
def test_other_data_are_refused(runs, refused, name):
    source = Path("corpus.txt" if name == "newllm" else "rows.jsonl")
    source.write_text(source.read_text().replace("w3 " if name == "newllm" else "alpha", "zeta "))
    before = {path: path.read_bytes() for path in (runs / name).rglob("*") if path.is_file()}
    told = refused(COMMANDS[name], "--resume", name, *GO_ON[name])
    assert f"dataset: {source} is not what the run was trained on" in told
    assert refused("evaluate", name) == told
    left = {path: path.read_bytes() for path in (runs / name).rglob("*") if path.is_file() and path.name != ".lock"}
    assert left == before
