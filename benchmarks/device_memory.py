"""The memory that `--dry_run` plans for each device against what a run takes: `python -m benchmarks.device_memory`.

Every row is a training command: its plan, then one epoch or two of the run, each in a process of its own. The base has
random weights of the architecture of SmolLM2, which take the memory of any others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.program import Program, names, run_program
from benchmarks.tables.devices import memory_table

CHUNKS = "--train_chunks 256 --validation_chunks 64 --num_epochs 1 --batch_size 64"
DESIGN = f"{CHUNKS} --calibration_chunks 0 --test_chunks 0"
ROWS = {  # what runs, and on which grids
    "full fine-tuning": (f"finetune --config smollm2_135m {CHUNKS}", ["data=1", "data=2", "data=1,fsdp=2"]),
    "full fine-tuning that computes activations again": (
        f"finetune --config smollm2_135m {CHUNKS} --recompute true", ["data=1,fsdp=2"],
    ),
    "LoRA": (f"finetune --config lora {CHUNKS}", ["data=2"]),
    "CASCADE `plus`": (f"cascade --config plus {DESIGN}", ["data=1", "data=2", "data=1,fsdp=2"]),
    "CASCADE as published, one stage": (
        "cascade --config published --train_chunks 256 --validation_chunks 64 --num_epochs 1 --num_stages 1",
        ["data=2"],
    ),
    "New-LLM `advanced`": ("train --config advanced --num_epochs 2", ["data=1", "data=2"]),
    "New-LLM `wikitext2`": ("train --config wikitext2 --num_epochs 1", ["data=1", "data=2"]),
    "full fine-tuning of SmolLM2-1.7B": (
        "finetune --config smollm2_135m --train_chunks 64 --validation_chunks 16 --num_epochs 2 --batch_size 16",
        ["data=1,fsdp=4"],
    ),
}  # fmt: skip
LARGE = {"full fine-tuning of SmolLM2-1.7B"}  # on a base of these sizes, the others on one of SmolLM2-135M's:
LARGE_BASE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_layers": 24,
    "num_heads": 32,
    "num_kv_heads": 32,
}


def options() -> Program:
    """The program with its options; nothing is parsed yet."""
    program = Program("device_memory", "Compare planned and used memory of each device.", "")
    add = program.parser.add_argument
    add("--works", default=",".join(ROWS), help="what runs (default: everything)")
    add("--texts", default="data/wikitext", help="texts of New-LLM (default %(default)s)")
    add("--rows", default="data/alpaca", help="rows of CASCADE (default %(default)s)")
    return program


def main(argv: Sequence[str]) -> None:
    """Measures, writes after every row, and prints the table."""
    program = options().parse(argv)
    typed = program.arguments
    with program:
        program.start(ceilings=False)
        rows = program.results["rows"] = []
        for work in names(typed.works, [*ROWS], "works"):
            command, grids = ROWS[work]
            sources = ["--dataset", typed.texts] if command.startswith("train") else [
                "--dataset", typed.rows, "--base_model", str(random_base(program.folder, work in LARGE))]  # fmt: skip
            for grid in grids:
                rows.append({"work": work, "mesh": grid, **measure(command.split(), sources, grid, program.folder)})
                program.save()
        program.write(memory_table(program.results))


def random_base(parent: Path, large: bool) -> Path:
    """A base of SmolLM2's sizes, which reads bytes. It is written where it is not there yet."""
    from newllm_jax.smollm.llama_config import LlamaConfig
    from tests.reliability.tiny import write_base

    folder = parent / ("large-base" if large else "base")
    if not folder.exists():
        write_base(folder, vars(LlamaConfig(**LARGE_BASE if large else {})))
    return folder


def measure(command: list[str], sources: list[str], grid: str, folder: Path) -> dict[str, Any]:
    """The planned bytes of a device, and the most that the first one had in use."""
    start = [sys.executable, "-m", "newllm_jax", *command, "--mesh", grid]
    root = folder / f"runs-{len(list(folder.glob('runs-*')))}"
    row: dict[str, Any] = {"command": " ".join(["newllm", *command, "--mesh", grid])}
    for extra in (["--dry_run"], ["--run_root", str(root)]):
        found = subprocess.run([*start, *sources, *extra], capture_output=True, text=True)
        if found.returncode:
            return row | {"error": (found.stderr.strip().splitlines() or ["?"])[-1][:300]}
        if extra == ["--dry_run"]:
            row["planned_bytes"] = json.loads(found.stdout)["estimated_memory_bytes"]
    (run,) = root.iterdir()
    return row | {"peak_bytes": json.loads((run / "results.json").read_text())["peak_memory_bytes"]}


if __name__ == "__main__":
    raise SystemExit(run_program(main))
