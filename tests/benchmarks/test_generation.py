"""What the benchmark of generation measures on a GPU, in which order, and which form it finds fastest."""

from __future__ import annotations

import time

import pytest

from benchmarks.generation import CASE, Rows, main, options
from benchmarks.subjects.jax_generation import FORMS, ONE_KERNEL
from newllm_jax.errors import InputError

pytestmark = pytest.mark.quick

TOKENS = 64
RATES = {"dots": 900.0, "sums of rows": 2000.0, "sums, attention too": 5000.0}  # the last with another text


@pytest.fixture
def rows(monkeypatch):
    """Measures nothing, but finds `RATES`; a graph of the loop is faster, and crashes for one form."""
    program = options().parse([])
    program.results = {"rows": [], "ceilings": {"read_bytes_per_second": 1e12}}
    monkeypatch.setattr(program, "save", lambda: None)

    def measure(function, task, what, limit):
        def row(case, rate, ids):
            rate *= 1.5 if case["graphs"] == "the loop" else 1
            spread = {"median": rate, "min": rate, "max": rate}
            return {**case, "tokens_per_second": spread, "ids": ids, "base_parameters": 1_000_000_000}

        if "form" not in task:
            return {"rows": [row({"form": what, **CASE}, 300.0, list(range(TOKENS)))]}
        if task["form"] == "dots with rows" and task["cases"][0]["graphs"] == "the loop":
            return {"error": "ended with code -6"}
        ids = list(range(1 if task["form"] == "sums, attention too" else 0, TOKENS))
        rate = RATES.get(task["form"], 1000.0)
        return {"rows": [row({"form": task["form"], **case}, rate, ids) for case in task["cases"]]}

    monkeypatch.setattr(program, "measure", measure)
    return Rows(program, {"tokens": TOKENS}, time.monotonic() + 100)


def test_the_fastest_with_the_right_text_is_varied(rows):
    rows.measure_all(list(FORMS), cpu=False)
    best = rows.fastest(FORMS)
    assert (best["form"], best["graphs"]) == ("sums of rows", "the loop")
    assert best["bytes_fraction"] == pytest.approx(4 * 1e9 * 3000 / 1e12)
    assert [row["error"] for row in rows.rows if "error" in row] == ["ended with code -6"]
    varied = {(row["form"], row["graphs"]) for row in rows.rows if row.get("per_call") == 64}
    assert varied == {("sums of rows", "the loop")}
    assert {row["graphs"] for row in rows.rows if row.get("stage_layers")} == {"every kernel", "conditionals"}


def test_when_the_time_is_up_nothing_more_is_started(rows, capsys):
    rows.end = 0
    rows.measure_all(list(FORMS), cpu=False)
    assert rows.rows == [] and "dots, 4 cases: left out" in capsys.readouterr().err


def test_one_kernel_makes_one_text_and_the_others_batches_and_stages(rows, monkeypatch):
    monkeypatch.setitem(RATES, ONE_KERNEL, 4000.0)
    rows.measure_all([*FORMS, ONE_KERNEL], cpu=False)
    kernels = [row for row in rows.rows if row["form"] == ONE_KERNEL]
    assert {row["batch"] for row in kernels} == {1} and not any(row.get("stage_layers") for row in kernels)
    assert 64 in {row["per_call"] for row in kernels}  # the fastest of all is varied
    assert {row["batch"] for row in rows.rows if row["form"] == "sums of rows"} == {1, 32}
    assert {row["form"] for row in rows.rows if row.get("stage_layers")} == {"sums of rows"}


def test_a_cpu_does_not_have_one_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.harness.program.Program.start", lambda *_: {"platform": "cpu"})
    with pytest.raises(InputError, match="forms: must be more than 'one kernel', which needs a GPU"):
        main(["--forms", ONE_KERNEL, "--output", str(tmp_path / "x.json")])
