"""Several processes that train one model: how they find each other, what they leave, and one of them killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from newllm_jax.errors import InputError
from newllm_jax.processes import Membership, agree, by_first, connect, first_reason, host_copies, is_first, place_in
from tests.reliability.tiny import CUTTABLE_LLAMA, NEWLLM, environment, options, settings, write_base, write_sources

VARIABLES = {"JAX_COORDINATOR_ADDRESS": "first:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SECONDS = 240  # far more than anything here takes


def test_the_place_of_a_process_by_plain_variables():
    assert place_in({}) is None
    assert place_in(VARIABLES) == Membership("first:1234", 4, 3, None)
    assert place_in({**VARIABLES, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


def test_the_place_of_a_process_in_a_job_step_of_slurm():
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}
    assert place_in(step) == Membership(None, None, None, [0, 1, 2, 3])  # alone on its node: all devices are its own
    assert place_in({**step, "SLURM_STEP_TASKS_PER_NODE": "4"}) == Membership(None, None, None, None)
    assert place_in({**step, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(("changed", "message"), [
    ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID: must be set where JAX_COORDINATOR_ADDRESS or JAX_NUM_PROCESSES is"),
    ({"JAX_PROCESS_ID": "4"}, r"JAX_PROCESS_ID: must be below JAX_NUM_PROCESSES \(4\), not 4"),
    ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES: must be a number, not 'four'"),
    ({"JAX_COORDINATOR_ADDRESS": "first"}, "JAX_COORDINATOR_ADDRESS: must be host:port"),
])  # fmt: skip
def test_variables_that_cannot_be_right(changed, message):
    with pytest.raises(InputError, match=message):
        connect({**VARIABLES, **changed})


def test_one_process_agrees_with_itself():
    done = []
    by_first(lambda: done.append(1))
    assert done == [1] and is_first() and agree("a") == "a" and agree(3) == 3 and first_reason("why") == "why"
    assert host_copies({"a": np.arange(3)})["a"].tolist() == [0, 1, 2]


def simulated(devices: int) -> dict[str, str]:
    """The variable that has a CPU be so many devices."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"}


class Processes:
    """Two processes of two simulated devices each, which run one command."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        common = environment(folder) | {
            "JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
            **simulated(2), "NEWLLM_PROCESS_TIMEOUT": "10",
        }  # fmt: skip
        self.logs = [folder / f"{number}.log" for number in range(2)]
        self.running = []
        for number, log in enumerate(self.logs):
            with log.open("w") as stream:
                self.running.append(subprocess.Popen(
                    [*NEWLLM, *arguments], env={**common, "JAX_PROCESS_ID": str(number)}, stdout=stream,
                    stderr=subprocess.STDOUT, cwd=folder,
                ))  # fmt: skip

    def wait(self) -> list[int]:
        """The exit codes."""
        return [process.wait(SECONDS) for process in self.running]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running:
            process.kill()
            process.wait()


@pytest.fixture
def folder(tmp_path) -> Path:
    write_sources(tmp_path)
    write_base(tmp_path / "base", CUTTABLE_LLAMA)
    return tmp_path


def alone(folder: Path, devices: int, *arguments: str) -> subprocess.CompletedProcess:
    """A command in one process."""
    return subprocess.run(
        [*NEWLLM, *arguments], env=environment(folder) | simulated(devices), capture_output=True, text=True,
        timeout=SECONDS, cwd=folder,
    )  # fmt: skip


def losses(run: Path) -> list[list[float]]:
    entries = json.loads((run / "results.json").read_text())["epochs"]
    return [[entry["train_loss"], entry["val_loss"]] for entry in entries]


def test_divided_parameters_are_trained_by_two_processes_and_resumed_by_one(folder):
    typed = {**settings(folder)["finetune"], "num_epochs": 2, "learning_rate": 0.003}
    command = "finetune", "--run_root", str(folder / "runs"), *options(typed), "--mesh", "data=2,fsdp=2"
    with Processes(folder, *command) as both:
        assert both.wait() == [0, 0], both.logs[0].read_text()[-2000:]
    assert "report" in both.logs[0].read_text() and "report" not in both.logs[1].read_text()  # one of them tells
    (run,) = (folder / "runs").iterdir()
    assert json.loads((run / "results.json").read_text())["mesh"] == {"data": 2, "fsdp": 2, "processes": 2}

    resumed = alone(folder, 2, "finetune", "--resume", str(run), "--num_epochs", "3", "--mesh", "data=2")
    assert resumed.returncode == 0 and "continuing after epoch 2" in resumed.stdout, resumed.stderr
    never = alone(folder, 1, "finetune", "--run_root", str(folder / "whole"), *options({**typed, "num_epochs": 3}))
    assert never.returncode == 0, never.stderr
    np.testing.assert_allclose(losses(run), losses(next((folder / "whole").iterdir())), rtol=2e-4)


def test_one_process_is_killed_the_other_ends_and_the_run_goes_on_in_one(folder):
    typed = {**settings(folder)["train"], "num_epochs": 5000, "patience": 5000, "examples": "files"}
    typed = options({**typed, "dropout": 0.2, "learning_rate": 0.001, "clip_norms": [1.0], "clip_epochs": []})
    with Processes(folder, "train", "--run_root", str(folder / "runs"), *typed) as both:
        deadline = time.monotonic() + SECONDS
        while not (done := [path for path in folder.glob("runs/*/metrics.jsonl") if path.read_text().count("\n") > 2]):
            assert time.monotonic() < deadline and both.running[0].poll() is None, both.logs[0].read_text()[-2000:]
            time.sleep(0.2)
        both.running[1].kill()
        assert both.running[0].wait(60) not in (0, 2, 3)  # neither finished nor given up
    run = done[0].parent
    more = len(done[0].read_text().splitlines()) + 2
    resumed = alone(folder, 1, "train", "--resume", str(run), "--num_epochs", str(more))
    assert resumed.returncode == 0 and "continuing after epoch" in resumed.stdout, resumed.stderr
    never = alone(folder, 1, "train", "--run_root", str(folder / "whole"), *typed, "--num_epochs", str(more))
    assert never.returncode == 0, never.stderr
    np.testing.assert_allclose(losses(run), losses(next((folder / "whole").iterdir())), rtol=2e-4)


@pytest.mark.parametrize("command", ["sweep", "cascade"])
def test_what_one_process_does_alone(folder, command):
    """The place is looked at before the others are waited for."""
    typed = options(settings(folder)["train" if command == "sweep" else command])
    if command == "sweep":
        variables = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        found = subprocess.run([*NEWLLM, "sweep", *typed], env=environment(folder) | variables, capture_output=True,
                               text=True, cwd=folder)  # fmt: skip
        assert found.returncode == 2
        assert found.stderr == "error: sweep: its members share the devices of one process; start it in one\n"
        return
    with Processes(folder, "cascade", *typed) as both:
        assert both.wait() == [2, 2]
    assert "error: context: stages of the published design" in both.logs[0].read_text()
