"""The last files of a run: a report is always that of the results beside it."""

from __future__ import annotations

import json

import pytest

from newllm_jax.records.directory import RunDir
from newllm_jax.report.finish import complete, write_results

pytestmark = pytest.mark.quick


def report_of(run, results):
    run.write_text("report.html", f"page of {results}")
    return run.write_text("report.md", str(results))


def killed(run, results):
    raise KeyboardInterrupt


def test_a_report_of_earlier_results_does_not_stay(tmp_path):
    run = RunDir(tmp_path, {})
    write_results(run, report_of, {"epochs": 1})
    with pytest.raises(KeyboardInterrupt):
        write_results(run, killed, {"epochs": 2})
    assert json.loads((tmp_path / "results.json").read_text())["epochs"] == 2
    assert not (tmp_path / "report.md").exists() and not (tmp_path / "report.html").exists()
    complete(run, {"epochs": 2}, report_of)
    assert (tmp_path / "report.md").read_text() == "{'epochs': 2}"
    complete(run, {}, killed)  # it is there
    (tmp_path / "report.html").unlink()  # an earlier version wrote none
    complete(run, {"epochs": 2}, report_of)
    assert (tmp_path / "report.html").read_text() == "page of {'epochs': 2}"
