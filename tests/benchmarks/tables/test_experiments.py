"""The tables of sweeps: members that differ in their seed alone are one row, and the figures are those by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.tables import files
from benchmarks.tables.experiments import change_table, search_table
from newllm_jax.config import load_config

pytestmark = pytest.mark.quick


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes files of results into a folder of their own, the published runs (PPL 30, 32, 34) among them."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)

    def write(name, content):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))

    for seed, ppl in enumerate((30.0, 32.0, 34.0)):
        older = {"batch_size": 512, "context_dim": 512, "num_layers": 12, "seed": seed, "dataset": "data/wikitext"}
        write(f"newllm/advanced-seed{seed}", {
            "config": older, "epochs": [{}] * 50, "best": {"val_ppl": ppl}, "test": {"ppl": ppl - 1},
        })  # fmt: skip
    return write


def sweep(*members, **settings):
    return {"config": load_config("advanced", {"dataset": "elsewhere", **settings}).to_dict(), "members": list(members)}


def member(val_ppl, test_ppl=None, epochs=50, **settings):
    return {
        "settings": settings, "epochs": epochs, "best": val_ppl and {"epoch": epochs, "val_ppl": val_ppl},
        "test": test_ppl and {"ppl": test_ppl},
    }  # fmt: skip


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


PUBLISHED = ["published settings", "50", "30.00 / 32.00 / 34.00", "32.00 +- 2.00", "-", "31.00"]


def test_without_sweeps_the_published_settings_stand_alone(results):
    assert cells(change_table())[2:] == [PUBLISHED]
    assert search_table() == "Not run yet."


def test_what_each_change_is_worth(results):
    # Deviations by hand: of 20, 23: 3 / sqrt(2) = 2.12, error 1.5; of the published ones error 2 / sqrt(3) = 1.155.
    results("experiments/learning-rate", sweep(
        member(23.0, 22.0, learning_rate=5e-4, seed=1), member(20.0, 20.0, learning_rate=5e-4, seed=0),
        member(25.0, 24.0, learning_rate=3e-4, seed=0), member(33.0, 32.0, learning_rate=1e-4, seed=0),
    ))  # fmt: skip
    results("experiments/base", sweep(member(31.0, 30.0, seed=1)))
    results("experiments/batch", sweep(
        member(26.0, None, batch_size=128, seed=0), member(28.0, 20.0, 40, batch_size=128, seed=1),
        member(None, None, 3, batch_size=1024, seed=0), member(19.0, 18.0, batch_size=256, learning_rate=3e-4),
    ))  # fmt: skip
    results("experiments/ctx1024", sweep(member(29.0, 28.0, seed=0), member(29.0, 28.0, seed=1), context_dim=1024))
    assert cells(change_table())[2:] == [
        PUBLISHED,
        # 33, 31: mean 32, deviation sqrt(2); error of the difference sqrt(1 + 4/3) = 1.53
        ["published settings, in a sweep", "50", "33.00 / 31.00", "32.00 +- 1.41", "+0.00 +- 1.53", "31.00"],
        ["batch_size=128", "40 to 50", "26.00 / 28.00", "27.00 +- 1.41", "-5.00 +- 1.53", "-"],
        ["batch_size=1024", "3", "-", "-", "-", "-"],
        ["learning_rate=0.0003", "50", "25.00", "25.00", "-7.00", "24.00"],
        # sqrt(1.5^2 + 4/3) = 1.89
        ["learning_rate=0.0005", "50", "20.00 / 23.00", "21.50 +- 2.12", "-10.50 +- 1.89", "21.00"],
        ["context_dim=1024", "50", "29.00 / 29.00", "29.00 +- 0.00", "-3.00 +- 1.15", "28.00"],
        ["batch_size=256, learning_rate=0.0003", "50", "19.00", "19.00", "-13.00", "18.00"],
    ]


def test_members_of_a_search_by_perplexity(results):
    results("recipes/first", sweep(
        member(30.0, 29.0, cell="residual", tie_embeddings=True), member(None, None, 2, learning_rate=0.5),
        member(20.0, None, cell="residual", clip_norms=[1], clip_epochs=[]), initialization="he",
    ))  # fmt: skip
    results("recipes/second", sweep(member(25.0, 24.0, 60), initialization="he", num_epochs=60, precision="tf32"))
    found = cells(search_table())
    names = ["num_epochs", "learning_rate", "cell", "tie_embeddings", "clip_norms", "clip_epochs"]
    assert found[0] == ["search", *names, "epochs", "val PPL", "test PPL"]
    first, second = "[first](recipes/first.json)", "[second](recipes/second.json)"
    clip = ["0.5,1,2", "10,30"]
    assert found[2:] == [
        [first, "50", "0.0001", "residual", "false", "1", "", "50", "20.00", "-"],
        [second, "60", "0.0001", "plain", "false", *clip, "60", "25.00", "24.00"],
        [first, "50", "0.0001", "residual", "true", *clip, "50", "30.00", "29.00"],
        [first, "50", "0.5", "plain", "false", *clip, "2", "-", "-"],
    ]
