"""Sweeps of New-LLM: time over the length of a text and over the batch, memory of generation, planned memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.program import Program, sizes
from newllm_jax.config import NewLLMConfig, load_config
from newllm_jax.newllm.wikitext import load_wikitext

SWEEPS = ("length", "batch", "memory", "plan")
LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096]
BATCHES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
LENGTH_BATCH = 32  # texts, at every length
VOCABULARY = 1000
MEMORY_LIMIT = 14 * 2**30  # of the device that the reports used, a T4
# What the report of New-LLM ran and planned; a learning rate or a schedule changes no memory.
PLANS: dict[str, dict[str, Any]] = {
    "baseline": {}, "advanced": {}, "advanced, batch 256": {"batch_size": 256},
    "advanced, batch 128": {"batch_size": 128}, "ctx1024": {},
}  # fmt: skip


def run_sweep(program: Program, configs: dict[str, NewLLMConfig]) -> None:
    """Measures the sweep that the options name into the program's results."""
    sweep = program.arguments.sweep
    program.name = f"newllm-{sweep}"
    chosen = sizes(program.arguments.sizes, "sizes") if program.arguments.sizes else None
    environment = program.start(program.arguments.precision, ceilings=False)
    cpu = environment["platform"] == "cpu"
    program.results |= {"benchmark": "newllm", "sweep": sweep}
    if not program.arguments.config and (cpu or sweep in {"length", "memory"}):
        configs = {"baseline": configs["baseline"]}
    if sweep == "memory":
        generation(program, configs, 2_000 if cpu else 1_000_000)
    elif sweep == "plan":
        plans(program, configs)
    else:
        over_sizes(program, configs, environment, chosen)


def over_sizes(
    program: Program, configs: dict[str, NewLLMConfig], environment: dict[str, Any], chosen: list[int] | None
) -> None:
    """Updates at growing length (synthetic ids, a fixed batch) or growing batch (the data, at its length)."""
    arguments, cpu = program.arguments, environment["platform"] == "cpu"
    by_length = arguments.sweep == "length"
    chosen = chosen or (LENGTHS if by_length else BATCHES)[: 2 if cpu else None]
    task: dict[str, Any] = {
        "vocabulary": VOCABULARY, "sequences": None,
        "updates": arguments.updates or (1 if cpu else 20), "repeats": arguments.repeats or (2 if cpu else 5),
    }  # fmt: skip
    program.results["data"] = "synthetic ids" if by_length else None
    program.results["configs"] = {}
    for name, config in configs.items():
        if by_length:
            task["sizes"] = [{"sequence_length": size, "batch_size": LENGTH_BATCH} for size in chosen]
        else:
            data = load_wikitext(config)
            path = program.folder / f"{name}-sequences.npy"
            np.save(path, data.sequences["train"])
            task |= {"sequences": str(path), "vocabulary": len(data.tokenizer)}
            task["sizes"] = [{"batch_size": size} for size in chosen]
            program.results["data"] = data.summary(config.batch_size)
        task["config"] = config.to_dict()
        what = f"{name}: {arguments.sweep} {', '.join(map(str, chosen))}"
        measured = program.measure("benchmarks.ours_newllm:measure_sizes", task, what, fatal=True)
        program.results["configs"][name] = {"config": config.to_dict(), **measured}


def generation(program: Program, configs: dict[str, NewLLMConfig], default: int) -> None:
    """One text of 100 words, and one of many, each generated in a process of its own."""
    counts = [100, program.arguments.tokens or default]
    program.results["configs"] = {}
    for name, config in configs.items():
        task = {"config": config.to_dict(), "vocabulary": VOCABULARY}
        rows = [
            program.measure(
                "benchmarks.generation:measure", task | {"tokens": count}, f"{name}: {count:,} words", fatal=True
            )
            for count in counts
        ]
        program.results["configs"][name] = {"config": config.to_dict(), "rows": rows}


def plans(program: Program, configs: dict[str, NewLLMConfig]) -> None:
    """What `--dry_run` says a run needs, for the configurations of the report and those it planned."""
    rows, asked = [], next(iter(configs.values()))
    for name, overrides in PLANS.items():
        chosen = {"dataset": asked.dataset, "precision": asked.precision, **overrides}
        config = load_config(name.split(",")[0], chosen)
        task = {"system": "newllm", "config": config.to_dict()}
        rows.append({"name": name, **program.measure("benchmarks.plans:measure", task, f"plan of {name}")})
    program.results |= {"limit_bytes": MEMORY_LIMIT, "rows": rows}
