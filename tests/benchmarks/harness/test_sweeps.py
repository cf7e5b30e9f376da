"""Each sweep over forms or seeds runs on a CPU, and its rows are those of the library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cascade, newllm
from benchmarks.harness import program, worker
from benchmarks.subjects.phases import waits_left_out
from benchmarks.tables.benchmark import form_table
from benchmarks.tables.phases import phase_table
from newllm_jax import load_config, train_cascade, train_newllm
from newllm_jax.errors import InputError
from newllm_jax.newllm.recurrence import gpu_group

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "benchmarks"


def toml(settings):
    """Settings as a configuration file."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs a benchmark on settings of its own; returns the path of their file and what the benchmark wrote."""

    def run(program, settings, *options):
        config, output = tmp_path / "small.toml", tmp_path / "found.json"
        config.write_text(toml(settings))
        argv = [f"--config={config}", f"--output={output}", *options]
        monkeypatch.setattr("sys.argv", ["benchmark", *argv])
        program.main(argv)
        return config, json.loads(output.read_text())

    return run


@pytest.fixture
def in_this_process(monkeypatch):
    """Measurements start no process, whose imports take longer than a small run; those of the forms still do."""

    def run(command, limit):
        worker.main(Path(command[-1]))
        return "no result", ""

    monkeypatch.setattr(program, "_run", run)


def test_forms_of_the_time_loop_make_the_same_updates(measured, small):
    options = "--sweep=forms", "--updates=2", "--repeats=3", "--sizes=2,6"
    config, found = measured(newllm, {**small, "dropout": 0.0}, *options)
    rows = found["configs"][str(config)]["rows"]
    assert [row["texts"] for row in rows] == [2, 2, 6, 6]
    for first in (rows[0], rows[2]):
        same = [row for row in rows if row["texts"] == first["texts"]]
        assert len({row["form"] for row in same}) == 2
        for row in same:
            assert row["precision"] == "fp32" and row["update_seconds"]["repeats"] == 3
            np.testing.assert_allclose(row["losses"], first["losses"], rtol=1e-5)
        assert len(set(first["losses"])) == 4  # it learns
    assert max(rows[0]["losses"]) != max(rows[2]["losses"])
    found["configs"][str(config)]["rows"][3]["update_seconds"]["median"] = 3 * rows[2]["update_seconds"]["median"]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in form_table(found).splitlines()[2:]]
    assert [(line[1], line[5]) for line in lines][2:] == [("6", "1.00"), ("6", "3.00")]
    assert lines[0][5] == "1.00"


def test_phases_need_a_gpu(measured, small):
    with pytest.raises(InputError, match="sweep: phases are those of the GPU kernels: .* not in fp32"):
        measured(newllm, {**small, "dropout": 0.0}, "--sweep=phases")


def test_kernels_wait_again_after_phases_without_waits():
    waiting = gpu_group.wait_for_blocks
    with waits_left_out():
        assert gpu_group.wait_for_blocks is not waiting
    assert gpu_group.wait_for_blocks is waiting


def test_waits_are_what_is_left_out_by_the_number_of_phases():
    times = {"median": 882e-6, "min": 441e-6, "max": 1e-3}
    without = {"median": 661.5e-6, "min": 5e-4, "max": 1e-3}
    row = {"name": "forward", "precision": "bf16", "phases": 441, "seconds": times, "seconds_without_waits": without}
    peer = {"name": "LSTM", "precision": "bf16", "phases": 441, "seconds": times}
    table = phase_table({"configs": {"baseline": {"rows": [row, peer]}}})
    ours, other = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:])
    assert ours[3:] == ["441", "0.882 (0.441 to 1.000)", "0.661 (0.500 to 1.000)", "2.00", "0.50"]
    assert other[3:] == ["441", "0.882 (0.441 to 1.000)", "-", "2.00", "-"]


@pytest.mark.usefixtures("in_this_process")
def test_seeds_of_newllm_are_the_runs_of_these_seeds(measured, small, tmp_path):
    config, found = measured(newllm, {**small, "num_epochs": 1}, "--sweep=seeds", "--seeds=3,0", "--precision=fp32")
    rows = found["rows"]
    assert [(row["config"], row["precision"], row["seed"]) for row in rows] == [
        (str(config), "fp32", s) for s in (3, 0)
    ]
    expected = train_newllm(load_config(str(config), {"seed": 3}), run_root=tmp_path, narrate=lambda _: None).results
    assert rows[0]["best"] == expected["best"] != rows[1]["best"]
    assert rows[0]["test"] == expected["test"]
    assert rows[0]["command"] == f"python train.py --config {config} --seed 3 --precision fp32"
    committed = json.loads((RESULTS / "newllm-seeds-h200.json").read_text())["rows"]
    assert all(row.keys() == rows[0].keys() for row in committed)


@pytest.mark.usefixtures("in_this_process")
def test_seeds_of_cascade_are_the_runs_of_these_seeds(measured, tiny, tmp_path):
    settings = {**tiny.to_dict(), "num_stages": 1, "num_epochs": 1, "precision": "fp32"}
    settings = {name: value for name, value in settings.items() if value is not None}
    _, found = measured(cascade, settings, "--sweep=seeds", "--seeds=1,0")
    rows = found["rows"]
    assert [row["seed"] for row in rows] == [1, 0]
    config = tiny.override({"num_stages": 1, "num_epochs": 1, "seed": 1})
    expected = train_cascade(config, run_root=tmp_path, narrate=lambda _: None).results
    assert [stage["best"] for stage in rows[0]["stages"]] == [stage["best"] for stage in expected["stages"]]
    ensembles = [[row["val_loss"] for row in entry["ensemble"]] for entry in (*rows, expected)]
    assert ensembles[0] == ensembles[2] != ensembles[1]
    committed = json.loads((RESULTS / "cascade-seeds-h200.json").read_text())["rows"]
    for row in committed:
        assert row.keys() <= rows[0].keys()
        assert row["stages"][0].keys() == rows[0]["stages"][0].keys()
