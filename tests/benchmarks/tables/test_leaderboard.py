"""The tables of the leaderboard, from files made up here."""

from __future__ import annotations

import json

import pytest

from benchmarks.tables import files, leaderboard

pytestmark = pytest.mark.quick


def member(val_ppl, test_ppl, **settings):
    return {
        "settings": settings, "parameters": 1234, "epochs": 9, "best": {"val_ppl": val_ppl, "epoch": 7},
        "test": {"ppl": test_ppl},
    }  # fmt: skip


def test_of_a_search_the_best_on_validation_is_listed_also_where_another_is_better_on_test(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    searches = {
        "one": [member(90.0, 80.0, learning_rate=0.1), member(85.0, 82.0, learning_rate=0.2)],
        "two": [member(86.0, 70.0, weight_decay=0.3)],
    }
    for name, members in searches.items():
        content = {
            "members": members, "command": f"sweep {name}", "environment": {"device": "some card", "precision": "bf16"},
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    entries = [leaderboard.Entry(name, (f"{name}.json",), "abc", "2026-01-02") for name in searches]
    monkeypatch.setattr(leaderboard, "STREAM", entries)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in leaderboard.stream().splitlines()[2:]]
    assert [line[2:8] for line in lines] == [
        ["one", "learning_rate=0.2", "1,234", "7 of 9", "**85.00**", "82.00"],
        ["two", "weight_decay=0.3", "1,234", "7 of 9", "86.00", "70.00"],
    ]
