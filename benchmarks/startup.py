"""From the start of a process to what it is for: `python -m benchmarks.startup` (options: `--help`).

Imports, `--help`, `--dry_run`, and the first finished update of a training, with empty and with filled caches of
compiled programs. The data are prepared beforehand; every cold run gets an empty folder of caches but for them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.program import ROOT, Program, configurations, positive, run_program
from benchmarks.harness.timing import spread
from benchmarks.tables.benchmark import benchmark_tables
from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError

IMPORTS = {
    "import jax, flax, optax": "import jax, flax, optax",
    "import newllm_jax": "import newllm_jax",
    "import newllm_jax, and its training": "import newllm_jax; newllm_jax.train_newllm",
}
PREPARE = "import sys, json, newllm_jax as n; n.load_wikitext(n.NewLLMConfig.from_dict(json.loads(sys.argv[1])))"
CACHE_SETTINGS = "JAX_COMPILATION_CACHE", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE"


class Failed(Exception):
    """A command that did not do what it should; the last line that it printed."""


def options() -> Program:
    """The program with its options; nothing is parsed or measured yet."""
    program = Program("startup", "Time imports, --help, --dry_run and the first update of a training.")
    add = program.parser.add_argument
    add("--config", metavar="NAMES", help="configurations a,b, names or files (default baseline,advanced; on a CPU "
        "baseline)")  # fmt: skip
    add("--dataset", help="data set: Hub name, folder, file or builtin (default: the configuration's)")
    add(
        "--imports",
        type=positive,
        default=5,
        metavar="RUNS",
        help="timed starts of every import and of --help (default 5)",
    )
    add("--runs", type=positive, help="number of cold and of warm starts of every training (default 3; on a CPU 1)")
    return program


def main(argv: Sequence[str]) -> None:
    """Measures what the command line asks for, writes and prints it."""
    program = options().parse(argv)
    arguments = program.arguments
    overrides = {"dataset": arguments.dataset} if arguments.dataset else {}
    configs = configurations(arguments.config, overrides)
    with program:
        environment = program.start(ceilings=False)
        cpu = environment["platform"] == "cpu"
        if cpu and not arguments.config:
            configs = {"baseline": configs["baseline"]}
        runs = arguments.runs or (1 if cpu else 3)
        rows = program.results["rows"] = []
        train = [sys.executable, str(ROOT / "train.py")]
        commands = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
        commands["train.py --help"] = [*train, "--help"]
        for name, command in commands.items():
            rows.append(row(name, command, program.folder / "empty", arguments.imports))
            program.save()
        for name, config in configs.items():
            rows.extend(first_updates(program.folder, name, config, arguments.dataset, runs))
            program.save()
        program.write(benchmark_tables(program.results))


def first_updates(folder: Path, name: str, config: NewLLMConfig, dataset: str | None, runs: int) -> list[Any]:
    """The first update of a configuration cold and warm, and its `--dry_run` with prepared data."""
    stem = Path(name).stem
    prepared, typed = folder / f"{stem}-data", ["--config", name, *(["--dataset", dataset] if dataset else [])]
    try:
        run([sys.executable, "-c", PREPARE, json.dumps(config.to_dict())], prepared)
    except Failed as error:
        raise InputError(f"the data of {name} cannot be prepared: {error}") from None
    cold, warm, last = [], [], prepared
    try:
        for number in range(runs):
            last = folder / f"{stem}-{number}"
            shutil.copytree(prepared, last)
            cold.append(first_update(typed, last))
        warm = [first_update(typed, last) for _ in range(runs)]
    except Failed as error:
        return [{"name": f"train.py --config {name}, first update", "error": str(error)}]
    dry = [sys.executable, str(ROOT / "train.py"), *typed, "--dry_run"]
    return [
        {"name": f"train.py --config {name}, first update, cold", "seconds": spread(cold)},
        {"name": f"train.py --config {name}, first update, warm", "seconds": spread(warm)},
        row(f"train.py --config {name} --dry_run, warm", dry, last, runs),
    ]


def row(name: str, command: list[str], caches: Path, runs: int) -> dict[str, Any]:
    """The times of a whole process."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        return {"name": name, "seconds": spread([run(command, caches) for _ in range(runs)])}
    except Failed as error:
        return {"name": name, "error": str(error)}


def first_update(typed: list[str], caches: Path) -> float:
    """Seconds from the start of the process to the end of the first update."""
    print(f"first update of {' '.join(typed)}, caches in {caches.name} ...", file=sys.stderr, flush=True)
    mark = caches / "mark"
    mark.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.subjects.first_update", str(mark), "train", *typed]
    started = time.time()
    run([*command, "--run_root", str(caches / "runs")], caches)
    return float(mark.read_text()) - started


def run(command: list[str], caches: Path) -> float:
    """Runs a command with its caches in a folder: seconds it took. Raises Failed."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(CACHE_SETTINGS)}
    variables |= {"NEWLLM_CACHE": str(caches), "CUDA_CACHE_PATH": str(caches / "cuda")}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.perf_counter()
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise Failed(f"exit code {done.returncode}: {lines[-1][:200]}")
    return seconds


if __name__ == "__main__":
    sys.exit(run_program(main))
