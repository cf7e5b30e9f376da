"""`newllm doctor`: looks at this machine and installation, and tells what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

from newllm_jax.cli.machine_checks import Observed, check_machine, checks_text
from newllm_jax.cli.options import Parser
from newllm_jax.cli.programs import program_folder
from newllm_jax.config import load_config
from newllm_jax.errors import InputError
from newllm_jax.systems import SYSTEMS, call

DRIVER = Path("/proc/driver/nvidia")  # where Linux tells of the driver and its GPUs
QUERY_SECONDS = 10.0


def doctor(argv: Sequence[str]) -> int:
    """`newllm doctor`: checks this machine and installation, and prints the command that mends what is wrong."""
    parser = Parser(prog="newllm doctor", allow_abbrev=False, description="Check this machine and installation. "
                    "The exit code is 1 where something fails.")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print versions, devices and checks as JSON")
    arguments = parser.parse_all(argv)
    facts, found = observe()
    checks = check_machine(found)
    failed = any(check.state == "fail" for check in checks)
    if arguments.json:
        print(json.dumps({**facts, "checks": [check._asdict() for check in checks]}, indent=2))
    else:
        print(checks_text(checks))
    return int(failed)


def observe() -> tuple[dict[str, Any], Observed]:
    """What there is to see: as JSON for a bug report, and for the checks."""
    from newllm_jax.files import cache_folder

    cache = cache_folder()
    gpus, driver = nvidia_gpus()
    folder, fault = _programs()
    common = {
        "python": sys.version_info[:3], "versions": {each.name: each.version for each in distributions()},
        "asked": os.environ.get("JAX_PLATFORMS", ""), "gpus": gpus, "driver": driver,
        "disks": {name: _free_disk(path) for name, path in {"runs": Path.cwd(), "caches": cache}.items()},
        "programs": folder, "programs_fault": fault, "hub": _hub(), "has_package": _has_package(cache),
    }  # fmt: skip
    facts: dict[str, Any] = {"cores": os.cpu_count(), "cache": str(cache), "hub": common["hub"] == "answers"}
    try:
        of_jax, seen = _observe_jax()
    except Exception as error:  # whatever a broken installation raises is what is looked for
        return facts, Observed(**common, fault=" ".join(str(error).split())[:300] or type(error).__name__)
    return {**of_jax, **facts}, Observed(**common, **seen)


def _observe_jax() -> tuple[dict[str, Any], dict[str, Any]]:
    """What only JAX can tell."""
    import jax

    from newllm_jax.records.machine import environment
    from newllm_jax.training.memory import device_memory, host_memory
    from newllm_jax.training.precision import supported_precisions

    found = environment("auto")
    defaults = {system.command: load_config(system.default, config_class=system.config) for system in SYSTEMS.values()}
    found["precision"] = {name: call(SYSTEMS[config.system].precision, config) for name, config in defaults.items()}
    obstacles = {system.command: call(system.warning, defaults[system.command]) for system in SYSTEMS.values()}
    found |= {"warnings": list(filter(None, obstacles.values())), "precisions": supported_precisions()}
    found |= {"devices": len(jax.devices())}
    memory = {name: free for name, free in (host_memory(), device_memory()) if free is not None}
    seen = {
        "platform": found["platform"], "device": found["device"], "memory": memory,
        "precisions": tuple(found["precisions"]), "obstacles": obstacles,
    }  # fmt: skip
    return found, seen


def nvidia_gpus(driver: Path = DRIVER) -> tuple[tuple[str, ...], str]:
    """The NVIDIA GPUs of this machine and the version of their driver, without JAX; "" where there is no driver."""
    with suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=QUERY_SECONDS, check=True,
        )  # fmt: skip
        rows = [line.rsplit(", ", 1) for line in asked.stdout.splitlines() if ", " in line]
        if rows:
            return tuple(name for name, _ in rows), rows[0][1]
    names, version = list[str](), ""
    for file in sorted(driver.glob("gpus/*/information")):
        with suppress(OSError):
            told = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
            names.append(told.get("Model", "NVIDIA GPU").strip())
    with suppress(OSError):
        words = (driver / "version").read_text().split()
        version = next((word for word in words if word[0].isdigit() and "." in word), "")
    return tuple(names), version


def _programs() -> tuple[str, str]:
    """The folder of compiled programs, and why it cannot be used."""
    try:
        folder = program_folder()
    except InputError as error:
        return "", str(error)
    except OSError as error:
        return "", f"{error.filename or 'cache'}: {error.strerror}"
    return str(folder), "" if os.access(folder, os.W_OK) else f"{folder} cannot be written to"


def _hub() -> Literal["answers", "silent", "offline"]:
    from newllm_jax.sources.hub import hub_answers, hub_is_offline

    return "offline" if hub_is_offline() else "answers" if hub_answers() else "silent"


def _has_package(cache: Path) -> bool:
    from newllm_jax.sources.weights import packaged_file

    return packaged_file(cache).is_file()


def _free_disk(path: Path) -> int:
    """The free bytes where a folder is or would be made."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
