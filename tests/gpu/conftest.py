"""These tests need an NVIDIA GPU that has tf32 and bf16; elsewhere they are skipped, with the reason.

Most of their time is compilation, so several processes, which take turns on the GPU, are faster than one; `--report`
writes what came out as JSON:

    python -m pytest -n 8 tests/gpu --report docs/results/gpu-tests-h200.json
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when JAX first uses the GPU
CAPABILITY = 8.0  # compute capability


def obstacle() -> str:
    """Why the tests cannot run here; "" where they can."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU; JAX has {device.platform}"
    capability = str(getattr(device, "compute_capability", ""))  # of AMD's GPUs it is no number
    if not capability.replace(".", "", 1).isdigit() or float(capability) < CAPABILITY:
        return (
            f"needs an NVIDIA GPU of compute capability {CAPABILITY}; {device.device_kind} has {capability or 'none'}"
        )
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"needs Pallas's Triton back end, which JAX {jax.__version__} does not have"
    return ""


@pytest.fixture(scope="session", autouse=True)
def gpu_with_tensor_cores():
    """Skips every test of this folder where there is none."""
    reason = obstacle()
    if reason:
        pytest.skip(reason)


def pytest_addoption(parser):
    """Read where this folder is named on the command line, and nowhere else."""
    parser.addoption("--report", metavar="FILE", help="write outcome and seconds of every test of tests/gpu as JSON")


class Report:
    """Writes the outcomes of a session."""

    def __init__(self, path: Path) -> None:
        self.path, self.tests = path, []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.removeprefix("tests/gpu/")
            self.tests.append({"test": name, "outcome": report.outcome, "seconds": round(report.duration, 1)})

    def pytest_sessionfinish(self, session):
        from newllm_jax.records.machine import environment

        counts = {what: sum(test["outcome"] == what for test in self.tests) for what in ("passed", "failed", "skipped")}
        processes = session.config.getoption("numprocesses", default=None) or 0
        command = f"python -m pytest -n {processes} tests/gpu --report {self.path.as_posix()}"
        results = {"command": command, "environment": environment("auto"), **counts, "tests": self.tests}
        self.path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def pytest_configure(config):
    path = config.getoption("--report", default=None)
    if path:
        config.pluginmanager.register(Report(Path(path)))
