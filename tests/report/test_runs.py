"""The list of runs: finished, running, stopped, damaged, and sweeps."""

import json
import shutil
import time

import pytest

from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir
from newllm_jax.report.runs import _bytes, list_runs, runs_text


def unfinished(root, name, config, *metrics):
    """A run directory without results."""
    with RunDir.open_or_create(root / name) as run:
        run.begin({"schema_version": 2, "system": "new-llm", "config": {"dataset": "texts", **config}})
        run.write_metrics(metrics)
    return run


@pytest.fixture
def runs(tmp_path, small_run):
    """A folder with a run of every kind, and what is none."""
    shutil.copytree(small_run, tmp_path / "whole")
    unfinished(tmp_path, "stopped", {"num_epochs": 50}, {"epoch": 12, "val_ppl": 71.5})
    unfinished(tmp_path, "staged", {"num_epochs": 9, "num_stages": 5}, {"epoch": 3, "stage": 2, "val_ppl": 7.0})
    unfinished(tmp_path, "begun-builtin", {"num_epochs": 9})
    broken = shutil.copytree(small_run, tmp_path / "broken")
    text = (broken / "results.json").read_text()
    (broken / "results.json").write_text(text.replace('"epoch": 1', '"epoch": 2'))
    (tmp_path / "nonsense").mkdir()
    (tmp_path / "nonsense" / "config.json").write_text('{"config": [], "system": 5}')
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").touch()
    return tmp_path


def test_every_run_has_its_line_and_damage_stops_nothing(runs, small_run):
    found = {run.name: run for run in list_runs(runs)}
    best = json.loads((small_run / "results.json").read_text())["best"]["val_ppl"]
    assert {name: (run.state, run.best) for name, run in found.items()} == {
        "whole": ("finished", best), "stopped": ("epoch 12 of 50", 71.5),
        "staged": ("stage 2 of 5, epoch 3 of 9", None),
        "begun-builtin": ("not begun", None), "broken": ("damaged", None), "nonsense": ("damaged", None),
    }  # fmt: skip
    assert found["whole"].size > 10_000 and found["whole"].system == "new-llm"
    assert [name for name, run in found.items() if run.fallback] == ["begun-builtin"]
    text = runs_text([*found.values()])
    assert len(text.splitlines()) == 1 + len(found) + 1 and "texts *" in text  # a header, and what the star means


def test_a_run_that_a_process_holds_is_running(runs):
    with RunDir.open(runs / "stopped"):
        assert {run.name for run in list_runs(runs) if run.running} == {"stopped"}
        assert "epoch 12 of 50, running" in runs_text(list_runs(runs))
    with RunDir.open(runs / "stopped"):  # looking has left the lock free
        pass
    assert not any(run.running for run in list_runs(runs))


def test_the_newest_comes_first(tmp_path):
    for number, name in enumerate(["old", "new"]):
        unfinished(tmp_path, name, {"num_epochs": 1})
        time.sleep(0.02 * (1 - number))
    assert [run.name for run in list_runs(tmp_path)] == ["new", "old"]
    trained = {run.name: run.changed for run in list_runs(tmp_path)}
    (tmp_path / "old" / "report.md").write_text("written again, later")
    assert {run.name: run.changed for run in list_runs(tmp_path)} == trained
    with RunDir.open(tmp_path / "old") as run:
        run.write_metrics([{"epoch": 1, "val_ppl": 2.0}])
    assert [run.name for run in list_runs(tmp_path)] == ["old", "new"]


def test_a_link_to_a_run_is_no_second_run(tmp_path):
    unfinished(tmp_path, "run", {"num_epochs": 1})
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert [run.name for run in list_runs(tmp_path)] == ["run"]


def test_a_sweep_is_one_line_with_its_best_member(tmp_path):
    with RunDir.open_or_create(tmp_path / "sweep") as sweep:
        sweep.begin(
            {"system": "new-llm-sweep", "config": {"dataset": "texts"}, "grid": {"seed": [0, 1], "dropout": [0]}}
        )
    for number, ppl in ((1, 60.0), (2, 50.0)):
        member = unfinished(
            tmp_path / "sweep" / "members", f"00{number}", {"num_epochs": 4}, {"epoch": 1, "val_ppl": ppl}
        )
        assert member.path.is_dir()
    (listed,) = list_runs(tmp_path)
    assert (listed.state, listed.best, listed.member, listed.data) == ("0 of 2 members", 50.0, "002", "texts")


def test_a_cascade_has_the_ensemble_beside_its_base(tmp_path):
    with RunDir.open_or_create(tmp_path / "run") as run:
        run.begin({"system": "cascade", "config": {"dataset": "alpaca"}})
        run.write_json("results.json", {
            "base": {"val_ppl": 17.0, "fallback": "no Hub"}, "data": {"source": "alpaca", "fallback": ""},
            "ensemble": [{"val_ppl": 17.0}, {"val_ppl": 15.0}, {"val_ppl": 16.0}],
        })  # fmt: skip
    (listed,) = list_runs(tmp_path)
    assert (listed.best, listed.base, listed.fallback) == (15.0, 17.0, True)
    assert "15.00 (base 17.00)" in runs_text([listed])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="folder: must be a folder of run directories that exists"):
        list_runs(tmp_path / "missing")


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (20 * 1024, "20 KiB"), (3 * 2**20, "3.0 MiB"),
     (5 * 2**30, "5.0 GiB"), (2**42, "4096 GiB")],
)  # fmt: skip
def test_sizes_are_in_the_largest_unit_that_they_fill(count, said):
    assert _bytes(count) == said
