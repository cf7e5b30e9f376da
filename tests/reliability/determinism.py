"""Whether every command gives the same bits again: `python -m tests.reliability.determinism`.

Each command runs in several processes, which share no compiled program: they choose and compile their own. Compared are
all trained parameters, all figures of `results.json` but times, and what the command prints. On a GPU that is done
without and with `--deterministic`, and `operations.py` says which operations differ. On a CPU one of the processes has
a single core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.tiny import CHECKOUT, CUTTABLE_LLAMA, environment, write_base

VARYING = {"seconds", "tokens_per_second", "command", "name", "run_id", "sha256", "peak_memory_bytes"}
ASKED_PLATFORMS = os.environ.get("JAX_PLATFORMS", "")  # before this process takes a CPU
NEWLLM = [
    "train.py", "--config=quickstart", "--hidden_dim=256", "--context_dim=256", "--num_layers=2", "--num_epochs=2",
]  # fmt: skip
FLAGS = {"default": [], "deterministic": ["--deterministic"]}
# Of the same command: the second process has other hashes, the third a single core.
PROCESSES = {"first": {}, "again": {"PYTHONHASHSEED": "1"}, "one core": {"ONE_CORE": "1"}}
LARGEST_CHANGE = 0.02  # relative; training magnifies rounding
ON_ONE_CORE = "import os, sys; os.sched_setaffinity(0, {0}); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


@dataclass(frozen=True)
class Outcome:
    """What a command gave: arrays by name as hashes, figures, and its duration."""

    arrays: dict[str, str]
    figures: Any
    seconds: float


def trainings(base: Path) -> dict[str, list[str]]:
    """The training commands by name."""
    chunks = [f"--base_model={base}", "--dataset=builtin", "--validation_chunks=8", "--num_epochs=2"]
    cascade = ["cascade.py", *chunks, "--train_chunks=16", "--num_stages=2", "--stage_layers=1"]
    return {
        "train": NEWLLM,
        "train --micro_batch 12": [*NEWLLM, "--micro_batch=12"],
        "train --precision fp32": [*NEWLLM, "--precision=fp32"],
        "cascade": cascade,
        "cascade --micro_batch 12": [*cascade, "--micro_batch=12"],
        "finetune": ["-m", "newllm_jax", "finetune", *chunks, "--train_chunks=32", "--batch_size=8"],
    }


def run(command: list[str], caches: Path, **variables: str) -> tuple[str, float]:
    """What a command prints, and how long it took. It uses no program that another one compiled."""
    started = time.monotonic()
    own = {"JAX_PLATFORMS": ASKED_PLATFORMS, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **variables}
    limit = ["-c", ON_ONE_CORE] if "ONE_CORE" in variables else []
    done = subprocess.run(
        [sys.executable, *limit, *command], cwd=CHECKOUT, env=environment(caches) | own, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout, time.monotonic() - started


def train(command: list[str], root: Path, **process: str) -> Outcome:
    """The outcome of a training command whose run goes to the folder `root`."""
    _, seconds = run([*command, "--run_root", str(root)], root.parent, **process)
    (run_dir,) = root.iterdir()
    return Outcome(trained_arrays(run_dir), figures(json.loads((run_dir / "results.json").read_text())), seconds)


def say(command: list[str], caches: Path, **process: str) -> Outcome:
    """The outcome of a command that only prints."""
    printed, seconds = run(command, caches, **process)
    return Outcome({}, printed, seconds)


def trained_arrays(run_dir: Path) -> dict[str, str]:
    """Hashes of the trained parameters of a run by their names."""
    import jax

    import newllm_jax
    from tests.reliability.operations import digest

    restored: Any = newllm_jax.restore(run_dir)
    system = restored.config.system
    trees = {
        "new-llm": lambda: restored.params,
        "finetune": lambda: restored.base.params,
        "cascade": lambda: [stage.params for stage in restored.stages],
    }
    leaves = jax.tree_util.tree_leaves_with_path(trees[system]())
    return {jax.tree_util.keystr(path): digest(leaf) for path, leaf in leaves}


def figures(content: Any) -> Any:
    """All of the results that should be the same in another process."""
    if isinstance(content, dict):
        return {key: figures(value) for key, value in content.items() if key not in VARYING}
    return [figures(item) for item in content] if isinstance(content, list) else content


def compare(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Which of several outcomes are equal to the first one."""
    first = outcomes["first"]
    others = {name: outcome for name, outcome in outcomes.items() if name != "first"}
    found: dict[str, Any] = {
        "same": {name: (each.arrays, each.figures) == (first.arrays, first.figures) for name, each in others.items()},
        "seconds": {name: round(each.seconds, 1) for name, each in outcomes.items()},
    }
    if first.arrays:
        found["arrays"] = len(first.arrays)
        found["arrays_that_differ"] = sorted(
            {name for each in others.values() for name in first.arrays if each.arrays[name] != first.arrays[name]}
        )
    if "epochs" in first.figures or "stages" in first.figures:
        found["val_losses"] = {name: val_losses(each.figures) for name, each in outcomes.items()}
    return found


def val_losses(results: Any) -> list[float]:
    """The validation losses of all epochs."""
    parts = results.get("stages", [results])
    return [entry["val_loss"] for part in parts for entry in part["epochs"]]


def compare_operations(flags: list[str], processes: dict[str, dict[str, str]], caches: Path) -> dict[str, Any]:
    """Which operations have the same bits every time in the first process, and in each of the others."""
    from newllm_jax.cli.options import deterministic_flags

    variables = {"XLA_FLAGS": deterministic_flags()} if flags else {}
    command = ["-m", "tests.reliability.operations"]
    runs = {name: json.loads(run(command, caches, **variables, **process)[0]) for name, process in processes.items()}
    first = runs.pop("first")
    return {
        name: {
            "same": {
                "first": len(set(result["hashes"])) == 1,
                **{process: each[name]["hashes"] == result["hashes"] for process, each in runs.items()},
            },
            "norm": result["norm"],
        }
        for name, result in first.items()
    }


def measure(
    mode: str, processes: dict[str, dict[str, str]], base: Path, folder: Path, workers: int
) -> dict[str, Any]:  # fmt: skip
    """All commands in all processes, and what of them is the same."""
    flags, found = FLAGS[mode], dict[str, Any]()
    with ThreadPoolExecutor(workers) as pool:
        operations = pool.submit(compare_operations, flags, processes, folder)
        trained = {
            (name, process): pool.submit(train, [*command, *flags], folder / f"{number}-{process}", **settings)
            for number, (name, command) in enumerate(trainings(base).items())
            for process, settings in processes.items()
        }
        for name in trainings(base):
            found[name] = compare({process: trained[name, process].result() for process in processes})
        said = {}
        for number, name in enumerate(trainings(base)):
            (run_dir,) = (folder / f"{number}-first").iterdir()
            commands = {
                f"generate, {name}": ["generate", str(run_dir), "--prompt=a class is", "--max_words=20", "--seed=3"],
                f"evaluate, {name}": ["evaluate", str(run_dir)],
            }
            for each, command in commands.items() if " --" not in name else ():
                for process, settings in processes.items():
                    said[each, process] = pool.submit(say, ["-m", "newllm_jax", *command, *flags], folder, **settings)
        for each in dict.fromkeys(each for each, _ in said):
            found[each] = compare({process: said[each, process].result() for process in processes})
        return {"commands": found, "operations": operations.result()}


def different(mode: dict[str, Any], processes: Collection[str]) -> list[str]:
    """The commands and operations of a mode that did not give the same bits in some of the processes."""
    every = mode["commands"] | mode["operations"]
    return [name for name, each in every.items() if not all(each["same"].get(process, True) for process in processes)]


def largest_changes(modes: dict[str, Any]) -> dict[str, float]:
    """What `--deterministic` changes, relative: of all validation losses, and of the norms of each operation's results.

    An operation that is wrong would show here.
    """
    default, deterministic = (modes[mode] for mode in FLAGS)
    losses = [
        abs(one - other) / one
        for name, each in default["commands"].items()
        if "val_losses" in each
        for one, other in zip(
            each["val_losses"]["first"], deterministic["commands"][name]["val_losses"]["first"], strict=True
        )
    ]
    norms = {
        name: abs(each["norm"] - deterministic["operations"][name]["norm"]) / each["norm"]
        for name, each in default["operations"].items()
    }
    return {"validation loss": max(losses), **norms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs" / "results" / "reliability" / "determinism.json")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes at a time")
    arguments = parser.parse_args()
    ask = "import json; from newllm_jax.records.machine import environment; print(json.dumps(environment('')))"
    with tempfile.TemporaryDirectory() as name:
        machine = json.loads(run(["-c", ask], Path(name))[0])
    on_cpu, started = machine["platform"] == "cpu", time.monotonic()
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, which computes nothing
    two = {name: PROCESSES[name] for name in ("first", "again")}
    modes = {"default": PROCESSES} if on_cpu else {mode: two for mode in FLAGS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder / "base", CUTTABLE_LLAMA)
        found = {
            mode: measure(mode, processes, folder / "base", folder / mode, arguments.workers)
            for mode, processes in modes.items()
        }
    results = {
        "command": "python -m tests.reliability.determinism",
        "environment": {key: value for key, value in machine.items() if key != "precision"},
        "cores": os.cpu_count(),
        "seconds": round(time.monotonic() - started),
        "modes": found,
        "not_the_same": {mode: different(each, ("first", "again")) for mode, each in found.items()},
        **({"not_the_same_on_one_core": different(found["default"], ("one core",))} if on_cpu else {}),
        **({} if on_cpu else {"changed_by_deterministic": largest_changes(found)}),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "modes"}, indent=2))
    if list(results["not_the_same"].values())[-1]:  # on a GPU with --deterministic
        raise SystemExit("not the same bits")
    if max(results.get("changed_by_deterministic", {"": 0.0}).values()) > LARGEST_CHANGE:
        raise SystemExit("--deterministic changes more than rounding does")


if __name__ == "__main__":
    main()
