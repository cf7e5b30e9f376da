"""Sweeps: the members are the runs that each would be alone, whatever they are trained beside."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from newllm_jax import train_newllm
from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError, Stopped
from newllm_jax.newllm import sweep
from newllm_jax.newllm.run import restore_newllm
from newllm_jax.newllm.sweep import plan_sweep, sweep_newllm
from newllm_jax.newllm.updates import build_members
from newllm_jax.report.sweep import sweep_table

SMALL = {
    "dataset": "builtin", "vocabulary_size": 50, "embed_dim": 16, "hidden_dim": 16, "context_dim": 16, "num_layers": 2,
    "sequence_length": 8, "stride": 8, "batch_size": 1024, "num_epochs": 2, "learning_rate": 3e-3,
    "sample_words": 0,
}  # fmt: skip
OPTIONS = {
    "cell": "residual", "initialization": "he", "dropout": 0.0, "variational_dropout": 0.1, "weight_dropout": 0.1,
    "input_dropout": 0.1, "output_dropout": 0.1, "word_dropout": 0.1, "weight_decay": 0.1, "ema_decay": 0.9,
    "schedule": "cosine",
}  # fmt: skip
GRID = {"learning_rate": [1e-3, 3e-3], "variational_dropout": [0.1, 0.3], "forget_bias": [1.0], "seed": [0, 1]}

ROUNDING = 2e-4  # relative; it grows with every update, for Adam makes whole steps of gradients that are rounding alone


def config(**settings):
    return NewLLMConfig.from_dict(SMALL | settings)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return sweep_newllm(config(**OPTIONS), GRID, run_root=tmp_path_factory.mktemp("sweep"), narrate=lambda _: None)


def histories(result):
    return {row["name"]: row["val_ppl"] for row in result.results["members"]}


@pytest.mark.parametrize("number", [1, 8])
def test_a_member_is_the_run_that_it_would_be_alone(swept, tmp_path, number):
    row = swept.results["members"][number - 1]
    alone = train_newllm(
        config(**{**OPTIONS, "forget_bias": 1.0, **row["settings"]}), run_root=tmp_path, narrate=lambda _: None
    )  # fmt: skip
    found = [entry["val_ppl"] for entry in alone.results["epochs"]]
    np.testing.assert_allclose(row["val_ppl"], found, rtol=ROUNDING)
    others = [other["val_ppl"] for other in swept.results["members"] if other != row]
    assert all(np.max(np.abs(np.array(other) / found - 1)) > 5 * ROUNDING for other in others)
    np.testing.assert_allclose(row["test"]["ppl"], alone.results["test"]["ppl"], rtol=ROUNDING)
    assert row["parameters"] == alone.results["parameters"]
    ours, theirs = restore_newllm(swept.run_dir / row["run"]), restore_newllm(alone.run_dir)
    assert ours.config == theirs.config
    for one, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_members_differ_and_are_named_by_what_differs(swept):
    found = histories(swept)
    assert len(found) == len(set(map(tuple, found.values()))) == 8
    assert list(found)[:2] == [
        "learning_rate=0.001, variational_dropout=0.1, seed=0", "learning_rate=0.001, variational_dropout=0.1, seed=1",
    ]  # fmt: skip
    assert swept.results["programs"] == 1


def test_the_table_has_the_best_member_first(swept):
    lines = sweep_table(swept.results["members"]).splitlines()[2:]
    figures = [float(line.split("|")[4]) for line in lines]
    assert figures == sorted(figures)
    assert figures != [round(row["best"]["val_ppl"], 2) for row in swept.results["members"]]
    assert lines[0].split("|")[1].strip() in (swept.run_dir / "report.md").read_text()


def test_what_no_program_can_share_is_another_program():
    planned = plan_sweep(config(), {"dropout": [0.0, 0.1], "hidden_dim": [8, 16], "seed": [0, 1]})
    assert [len(program["members"]) for program in planned["programs"]] == [2, 2, 2, 2]
    assert len({program["parameters"] for program in planned["programs"]}) == 2
    assert len(plan_sweep(config(), {"seed": [0, 1, 2, 3]})["programs"]) == 1
    assert [len(each["members"]) for each in plan_sweep(config(), {"seed": [0, 1, 2, 3]}, 3)["programs"]] == [2, 2]


def test_members_stop_and_fail_alone(monkeypatch, tmp_path):
    counted = []
    monkeypatch.setattr(sweep, "build_members", lambda *given: counted.append(given[3]) or build_members(*given))
    grid = {"learning_rate": [1e-3, 0.1, 1e29], "seed": [0, 1]}
    settings = {"num_epochs": 5, "patience": 1, "minimum_gain": 0.05}
    result = sweep_newllm(config(**settings), grid, run_root=tmp_path, narrate=lambda _: None)
    rows = {row["name"]: row for row in result.results["members"]}
    lost = [name for name, row in rows.items() if "failed" in row]
    assert counted == [6]  # which the form of the time loop depends on
    assert lost == ["learning_rate=1e+29, seed=0", "learning_rate=1e+29, seed=1"]
    assert "not finite" in rows[lost[0]]["failed"]
    lengths = {row["epochs"] for row in rows.values() if "epochs" in row}
    assert len(lengths) > 1  # or nobody stopped before another
    name = "learning_rate=0.1, seed=1"
    alone = train_newllm(config(**settings, learning_rate=0.1, seed=1), run_root=tmp_path, narrate=lambda _: None)
    assert rows[name]["epochs"] == len(alone.results["epochs"])
    np.testing.assert_allclose(rows[name]["test"]["ppl"], alone.results["test"]["ppl"], rtol=1e-3)


def test_a_stopped_sweep_goes_on_where_it_was(swept, tmp_path):
    def stop():
        return len(list(tmp_path.glob("*/members/*/checkpoints/epoch_1"))) > 0

    with pytest.raises(Stopped, match="--resume"):
        sweep_newllm(config(**OPTIONS), GRID, run_root=tmp_path, narrate=lambda _: None, stop=stop)
    (run_dir,) = tmp_path.iterdir()
    epochs = [len(list(member.glob("checkpoints/epoch_*"))) for member in (run_dir / "members").iterdir()]
    assert max(epochs) == 1
    again = sweep_newllm(resume=run_dir, narrate=lambda _: None)
    assert histories(again) == histories(swept)
    files = {path: path.read_bytes() for path in run_dir.glob("members/*/results.json")}
    assert histories(sweep_newllm(resume=run_dir, narrate=lambda _: None)) == histories(swept)
    assert files == {path: path.read_bytes() for path in run_dir.glob("members/*/results.json")}


@pytest.mark.parametrize(
    "grid, complaint",
    [
        ({"dropuot": [0.1, 0.2]}, "did you mean dropout"),
        ({"dropout": []}, "dropout: one value at least"),
        ({"dropout": [0.1, 0.1]}, "are the same"),
        ({"dropout": [0.1, 1.5]}, "dropout"),
        ({"dropout": "0.1"}, "dropout: a list of values"),
        ({"seed": list(range(1001))}, "1,001 members are more than 1,000"),
        ({"mirror": ["a", "b"]}, "mirror: does not go with a sweep"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(grid, complaint, tmp_path):
    with pytest.raises(InputError) as refused:
        sweep_newllm(config(), grid, run_root=tmp_path)
    assert complaint.split(":")[0] in str(refused.value) and complaint.split(": ")[-1][:8] in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_run_is_no_sweep(tmp_path):
    from newllm_jax.records.directory import RunDir

    with RunDir.create(tmp_path, "run") as run:
        run.begin({"system": "new-llm", "schema_version": 2})
    with pytest.raises(InputError, match="not a sweep"):
        sweep_newllm(resume=run.path)


def test_a_sweep_has_a_page_and_its_members_no_texts(swept):
    page = (swept.run_dir / "report.html").read_text()
    best = min(swept.results["members"], key=lambda row: row["best"]["val_loss"])
    assert "<svg" in page and f"{best['name'][:30]}" in page
    assert (swept.run_dir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    member = swept.run_dir / best["run"]
    assert "samples" not in json.loads((member / "results.json").read_text())
    with pytest.raises(InputError, match="sample_words: does not go with a sweep"):
        sweep_newllm(config(), {"sample_words": [4]})
