"""The tables of criteria and designs: interpolation and figures by hand, and what a file that is not there gives."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.tables import files
from benchmarks.tables.designs import ablation_table, hardness_table, ppl_at
from benchmarks.tables.pages import TABLES
from benchmarks.tables.results import cascade_commands

pytestmark = pytest.mark.quick


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes files of `docs/results/cascade` into a folder of their own."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    (tmp_path / "cascade").mkdir()
    return lambda name, content: (tmp_path / "cascade" / f"{name}.json").write_text(json.dumps(content))


def design(parameters, *points):
    return {
        "stages": [{"stage_parameters": parameters}],
        "curves": {"validation criterion": [
            {"asked": share, "hard_share": share, "flops": flops, "loss": loss, "ppl": math.exp(loss)}
            for share, flops, loss in points
        ]},
    }  # fmt: skip


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_without_files(results):
    assert (ablation_table(), hardness_table()) == ("Not run yet.", "Not run yet.")
    assert TABLES["cascade ablation"] is ablation_table and TABLES["cascade hardness"] is hardness_table


def test_designs_in_the_order_of_the_ablation(results):
    results("ablation", {"command": "", "designs": {
        "entry22": design(1000, (0, 1.05, 2.4), (0.5, 1.2, 2.2), (1, 1.35, 2.1)),
        "random-start": design(2_000_000, (0, 1.1, 2.4), (1, 1.2, 5.0)),
        "last-hidden-state": design(3000, (1, 1.5, 3.0), (0, 1.3, 2.4)),
        "recipe": design(4000, (0, 1.1, 2.4), (0.5, 1.4, 2.1), (1, 1.7, 2.0)),
    }})  # fmt: skip
    # recipe: two thirds of the way from 2.4 to 2.1, a third of that from 2.1 to 2.0; entry22: 2.2 + 2 / 3 * -0.1
    e = [f"{math.exp(loss):.2f}" for loss in (2.0, 2.2, 2.1 - 0.1 / 3, 2.1, 2.2 - 0.2 / 3, 5.0, 3.0, 2.4)]
    assert cells(ablation_table())[2:] == [
        ["recipe", "-", "4,000", e[0], "1.70", e[1], e[2]],
        ["random-start", "weights=own, learning_rate=0.0001, start=random", "2,000,000", e[5], "1.20", "-", "-"],
        ["last-hidden-state", "weights=own, learning_rate=0.0001, start=random, entry_layer=none", "3,000", e[6],
         "1.50", e[7], e[6]],
        ["entry22", "entry_layer=22", "1,000", e[3], "1.35", e[4], "-"],
    ]  # fmt: skip


def test_a_cost_that_two_points_share():
    points = design(1, (0, 1.3, 2.0), (0.1, 1.3, 2.1), (1, 1.6, 2.4))["curves"]["validation criterion"]
    assert ppl_at(points, 1.3) == pytest.approx(math.exp(2.0))
    assert ppl_at(points, 1.6) == pytest.approx(math.exp(2.4))
    assert ppl_at(points, 1.29) is None and ppl_at(points, 1.61) is None


def test_what_no_table_can_show(results):
    results("ablation", {"designs": {"recipe": design(1, (0, 1.1, 2.4), (0.9, 1.7, 2.0))}})
    with pytest.raises(ValueError, match="the curve of recipe has no point where all tokens take the hard path"):
        ablation_table()
    results("ablation", {"designs": {"receipt": {}}})
    with pytest.raises(ValueError, match=r"not in the ablation of .*: \['receipt'\]"):
        ablation_table()


def test_criteria(results):
    row = {
        "criterion": "entropy", "target": None, "loss_correlation": 0.74, "gain_correlation": 0.2, "hard_tokens": 6,
        "hard_ppl": 29.5, "easy_ppl": 2.5, "cost": 0.21,
    }  # fmt: skip
    results("hardness", {"hard_ratio": 0.6, "criteria": [row]})
    assert cells(hardness_table())[2] == [
        "entropy", "+0.74", "+0.20", "29.50", "2.50", "0.2100", "of the prediction"
    ]  # fmt: skip


def test_the_table_of_runs_leaves_out_what_is_none(results):
    results("hardness", {"command": "newllm hardness", "criteria": []})
    results("ablation", {"command": "", "designs": {}})
    environment = {"device": "H100", "precision": "tf32", "jax": "0.11"}
    results("plus", {
        "system": "cascade", "command": "python cascade.py", "environment": environment, "seconds": 9,
        "peak_memory_bytes": 2**30,
    })  # fmt: skip
    assert [row[0] for row in cells(cascade_commands())[2:]] == ["[plus](cascade/plus.json)"]
