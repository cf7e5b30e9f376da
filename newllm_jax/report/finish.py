"""The last files of a run: its results, then the report and the curves that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from newllm_jax.processes import is_first
from newllm_jax.records.directory import RunDir
from newllm_jax.records.results import RunResult

PAGE = "report.html"
REPORT = "report.md"  # the last file that a run writes

WriteReport = Callable[[RunDir, dict[str, Any]], Path]


def write_results(run: RunDir, write_report: WriteReport, results: dict[str, Any]) -> dict[str, Any]:
    """Writes `results.json`, whose content is returned, and the report. A report of earlier results vanishes first."""
    if is_first():
        for name in (REPORT, PAGE):
            (run.path / name).unlink(missing_ok=True)
    written = run.write_json("results.json", results)
    if is_first():
        write_report(run, written)
    return written


def complete(run: RunDir, results: dict[str, Any], write_report: WriteReport) -> RunResult:
    """The result of a finished run. Writes its report where it was killed before it had one."""
    if is_first() and not all((run.path / name).is_file() for name in (REPORT, PAGE)):
        write_report(run, results)
    return RunResult(run.path, results)
