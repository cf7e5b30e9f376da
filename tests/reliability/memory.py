"""Whether long runs need more and more memory: `python -m tests.reliability.memory`, about twelve minutes on two cores.

Processes that are watched from outside: a New-LLM of 2,000 epochs with a checkpoint after each, a CASCADE stage of 300,
generation in a loop; and Orbax alone, which saves trees of as many arrays as the New-LLM has, and as the stage has.
Resident memory, open files and threads are read as the processes go. What counts is how they grow by epoch (text,
save), after the first quarter. TensorStore, by which Orbax writes, never frees some memory of each array and tree that
it saves (0.1.75 to 0.1.86: what `Spec.to_json` and its metrics return). So a run is called flat where it grows by no
more than Orbax alone does with the same trees.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.reliability.tiny import CHECKOUT, environment, options, settings, write_sources

WARM_UP = 0.25  # of the epochs: compilation, and the allocator's pools
SAMPLES = 200
# Growth that a run may have: its history is a part of it, in memory and in every record of a checkpoint.
ALLOWED_BYTES = 4096  # by epoch
ORBAX_VARIES = 1.3  # how much faster one process that saves may grow than another
GENERATE = """
import sys
import newllm_jax
from newllm_jax.decoding.sampling import Sampling

run = newllm_jax.restore(sys.argv[1])
for number in range(int(sys.argv[2])):
    "".join(newllm_jax.generate(run, "a class", max_words=20, seed=number, sampling=Sampling(1.0)))
    print("epoch", number + 1, flush=True)
"""
ORBAX = """
import json, pathlib, shutil, sys
import jax.numpy as jnp
import orbax.checkpoint as ocp

folder, count, trees = pathlib.Path(sys.argv[1]).absolute(), int(sys.argv[2]), json.loads(sys.argv[3])
trees = {name: {str(number): jnp.zeros((16, 16)) for number in range(arrays)} for name, arrays in trees.items()}
with ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    for epoch in range(1, count + 1):
        content = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        checkpointer.save(folder / f"epoch_{epoch}", ocp.args.Composite(**content))
        checkpointer.wait_until_finished()
        if epoch > 1:
            shutil.rmtree(folder / f"epoch_{epoch - 1}")
        print("epoch", epoch, flush=True)
"""


def resources(process: int) -> dict[str, int]:
    """Resident bytes, open files and threads of a process. Linux only."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {
        "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
        "open_files": len(list(Path(f"/proc/{process}/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def watched(command: list[str], count: int, caches: Path) -> Iterator[dict[str, int]]:
    """The resources of a command about every `count / SAMPLES` lines that it prints of its epochs."""
    every, seen = max(count // SAMPLES, 1), 0
    with subprocess.Popen(command, cwd=CHECKOUT, env=environment(caches), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(("epoch", "stage 1  epoch")):
                continue
            seen += 1
            if seen % every == 0:
                yield {"epoch": seen, **resources(process.pid)}
    if process.returncode or seen != count:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} after {seen} of {count}")


def measure(command: list[str], count: int, caches: Path) -> dict[str, Any]:
    """How the resources of a command grow."""
    samples = list(watched(command, count, caches))
    steady = samples[int(WARM_UP * len(samples)) :]
    epochs = [sample["epoch"] for sample in steady]
    slopes = {
        name: float(np.polyfit(epochs, [sample[name] for sample in steady], 1)[0])
        for name in ("resident_bytes", "open_files", "threads")
    }
    return {
        "count": count,
        "growth_by_epoch": slopes,
        "first_steady": steady[0],
        "last": steady[-1],
        "most": {name: max(sample[name] for sample in steady) for name in slopes},
    }


def is_flat(process: dict[str, Any], orbax: float) -> bool:
    """Whether a process grows by no more than it may. `orbax`: bytes by epoch that Orbax alone grows by."""
    allowed = ALLOWED_BYTES + ORBAX_VARIES * orbax
    first, last = process["first_steady"], process["last"]
    return process["growth_by_epoch"]["resident_bytes"] < allowed and all(
        last[name] <= first[name] + 4 for name in ("open_files", "threads")
    )


def arrays_saved(run: Path) -> dict[str, int]:
    """How many arrays each tree of the latest checkpoint of a run has."""
    manifest = max(run.rglob("checkpoints/**/manifest/metadata"), key=lambda file: file.stat().st_mtime)
    return {name: len(arrays) for name, arrays in json.loads(manifest.read_text())["arrays"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs" / "results" / "reliability" / "memory.json")
    parser.add_argument("--epochs", type=int, default=2000, help="of the New-LLM")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder)
        tiny, python = settings(folder), [sys.executable, "-u"]
        counts = {"train": arguments.epochs, "cascade": 300}
        found, saved = dict[str, dict[str, Any]](), dict[str, dict[str, int]]()
        for name, count in counts.items():
            of_run = {**tiny[name], "num_epochs": count, "patience": count, "checkpoint_every": count}
            if name == "cascade":
                of_run |= {"num_stages": 1, "learning_rate": 1e-3}
            command = [*python, "-m", "newllm_jax", name, *options(of_run), "--run_root", str(folder / name)]
            found[name] = measure(command, count, folder)
            saved[name] = arrays_saved(folder / name)
            found[name]["arrays_by_epoch"] = sum(saved[name].values())
        (run,) = (folder / "train").iterdir()
        found["generate"] = measure([*python, "-c", GENERATE, str(run), "300"], 300, folder) | {"arrays_by_epoch": 0}
        for name, trees in saved.items():
            scratch, saves = folder / f"orbax-{name}", min(counts[name], 1000)
            scratch.mkdir()
            command = [*python, "-c", ORBAX, str(scratch), str(saves), json.dumps(trees)]
            found[f"Orbax alone, as {name}"] = measure(command, saves, folder) | {
                "arrays_by_epoch": sum(trees.values())
            }
    for name, process in found.items():
        alone = found.get(f"Orbax alone, as {name}", {"growth_by_epoch": {"resident_bytes": 0.0}})
        if "Orbax" not in name:
            process["flat"] = is_flat(process, alone["growth_by_epoch"]["resident_bytes"])
    results = {"command": "python -m tests.reliability.memory", "cores": os.cpu_count(), "processes": found}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    if not all(each.get("flat", True) for each in found.values()):
        raise SystemExit("not flat")


if __name__ == "__main__":
    main()
