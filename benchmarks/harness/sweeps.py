"""The sweeps of New-LLM, each a function of the program and its configurations that fills the program's results."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.program import Program, has_torch, integers, names
from newllm_jax.config import NewLLMConfig, load_config
from newllm_jax.newllm.wikitext import load_wikitext
from newllm_jax.training.precision import PRECISIONS

Configs = dict[str, NewLLMConfig]
LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096]
BATCHES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
LENGTH_BATCH = 32  # texts, at every length
VOCABULARY = 1000
MEMORY_LIMIT = 14 * 2**30  # bytes, of the device that the reports used, a T4
SEEDS = {"advanced": 10}  # number of seeds by configuration, beginning with 0; of all others: DEFAULT_SEEDS
DEFAULT_SEEDS = 3
# What the report of New-LLM ran and planned; a learning rate or a schedule changes no memory.
PLANS: dict[str, dict[str, Any]] = {
    "baseline": {}, "advanced": {}, "advanced, batch 256": {"batch_size": 256},
    "advanced, batch 128": {"batch_size": 128}, "ctx1024": {},
}  # fmt: skip


def run_sweep(program: Program, configs: Configs) -> None:
    """Measures the sweep that the options name, and puts it into the program's results."""
    arguments = program.arguments
    for option, least in (("sizes", 1), ("seeds", 0)):
        text = getattr(arguments, option)
        setattr(arguments, option, integers(text, option, least) if text else None)
    program.name = f"newllm-{arguments.sweep}"
    environment = program.start(arguments.precision, ceilings=False)
    program.results |= {"benchmark": "newllm", "sweep": arguments.sweep}
    if not arguments.config and (environment["platform"] == "cpu" or arguments.sweep in {"length", "memory"}):
        configs = {"baseline": configs["baseline"]}
    SWEEPS[arguments.sweep](program, configs)


def precisions(program: Program) -> list[str]:
    """The value of `--precision`, then those of `--also`."""
    arguments = program.arguments
    return [arguments.precision, *names(arguments.also, list(PRECISIONS), "also")]


def lengths(program: Program, configs: Configs) -> None:
    """Updates on ever longer texts of random ids, the number of texts in a batch fixed."""
    program.results["data"] = "synthetic ids"
    chosen = program.arguments.sizes or LENGTHS[: 2 if _on_cpu(program) else None]
    sizes = [{"sequence_length": size, "batch_size": LENGTH_BATCH} for size in chosen]
    for name, config in configs.items():
        _measure_sizes(program, name, config, {"sizes": sizes, "sequences": None, "vocabulary": VOCABULARY})


def batches(program: Program, configs: Configs) -> None:
    """Updates on ever larger batches of the data."""
    chosen = program.arguments.sizes or BATCHES[: 2 if _on_cpu(program) else None]
    for name, config in configs.items():
        data = load_wikitext(config)
        path = program.folder / f"{Path(name).stem}-sequences.npy"
        np.save(path, data.sequences["train"])
        program.results["data"] = data.summary(config)
        task = {"sequences": str(path), "vocabulary": len(data.tokenizer)}
        _measure_sizes(program, name, config, task | {"sizes": [{"batch_size": size} for size in chosen]})


def forms(program: Program, configs: Configs) -> None:
    """The same updates with the time loop in every form that the device can run, on random ids, for each batch size."""
    program.results["data"] = "synthetic ids"
    for name, config in configs.items():
        rows = []
        for size in program.arguments.sizes or [config.batch_size]:
            for precision, task in _precision_tasks(program, config.override({"batch_size": size})):
                what = f"{name}: forms of the time loop, {size} texts, {precision}"
                rows += program.measure("benchmarks.subjects.jax_newllm:measure_forms", task, what, fatal=True)["rows"]
        _store(program, name, config, rows)


def phases(program: Program, configs: Configs) -> None:
    """Both passes of the time loop, with the waits of their kernels and without, beside a step of cuDNN's LSTM."""
    program.results["data"] = "synthetic"
    for name, config in configs.items():
        rows = []
        for precision, task in _precision_tasks(program, config):
            what = f"{name}: phases, {precision}"
            rows += program.measure("benchmarks.subjects.phases:measure", task, what, fatal=True)["rows"]
            if has_torch():
                peer = {**_counts(program), "batch": config.batch_size, "precision": rows[-1]["precision"]}
                found = program.measure("benchmarks.subjects.torch_phases:measure", peer, f"{what}, LSTM", fatal=True)
                rows += found["rows"]
        _store(program, name, config, rows)


def generation(program: Program, configs: Configs) -> None:
    """One text of 100 words and one of many, each generated in a process of its own."""
    counts = [100, program.arguments.tokens or (2_000 if _on_cpu(program) else 1_000_000)]
    function = "benchmarks.subjects.generation:measure"
    for name, config in configs.items():
        task = {"config": config.to_dict(), "vocabulary": VOCABULARY}
        rows = [
            program.measure(function, task | {"tokens": count}, f"{name}: {count:,} words", fatal=True)
            for count in counts
        ]
        _store(program, name, config, rows)


def plans(program: Program, configs: Configs) -> None:
    """What `--dry_run` says a run needs, for the configurations of the report and those it planned."""
    rows, asked = [], next(iter(configs.values()))
    for name, overrides in PLANS.items():
        chosen = {"dataset": asked.dataset, "precision": asked.precision, **overrides}
        config = load_config(name.split(",")[0], chosen)
        task = {"system": "newllm", "config": config.to_dict()}
        rows.append({"name": name, **program.measure("benchmarks.subjects.plans:measure", task, f"plan of {name}")})
    program.results |= {"limit_bytes": MEMORY_LIMIT, "rows": rows}


def seeds(program: Program, configs: Configs) -> None:
    """Whole runs, one for each configuration, precision and seed; the file is written anew after each."""
    rows = program.results["rows"] = []
    for name, config in configs.items():
        chosen = program.arguments.seeds or range(SEEDS.get(name, DEFAULT_SEEDS))
        for precision in precisions(program):
            for seed in chosen:
                task = {"config": config.override({"seed": seed, "precision": precision}).to_dict()}
                what = f"{name}: a run in {precision}, seed {seed}"
                options = {"dataset": program.arguments.dataset, "seed": seed, "precision": precision}
                row = {"config": name, "precision": precision, "seed": seed}
                row |= program.measure("benchmarks.subjects.runs:newllm", task, what)
                rows.append(row | {"command": run_command("train.py", name, options)})
                program.save()


def run_command(script: str, config: str, options: dict[str, Any]) -> str:
    """The command that repeats one run of a sweep by itself; an option that is None is left out."""
    words = ["python", script, "--config", config]
    for option, value in options.items():
        words += [] if value is None else [f"--{option}", str(value)]
    return shlex.join(words)


def _precision_tasks(program: Program, config: NewLLMConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each precision that is asked for, and what a subject needs to measure the configuration in it."""
    for precision in precisions(program):
        yield precision, {**_counts(program), "config": config.override({"precision": precision}).to_dict()}


def _measure_sizes(program: Program, name: str, config: NewLLMConfig, task: dict[str, Any]) -> None:
    task = {**task, **_counts(program), "config": config.to_dict()}
    what = f"{name}: {program.arguments.sweep} {', '.join(str(next(iter(size.values()))) for size in task['sizes'])}"
    measured = program.measure("benchmarks.subjects.jax_newllm:measure_sizes", task, what, fatal=True)
    _store(program, name, config, measured["rows"])


def _counts(program: Program) -> dict[str, int]:
    """Updates in a timed block, and blocks."""
    arguments, cpu = program.arguments, _on_cpu(program)
    return {"updates": arguments.updates or (1 if cpu else 20), "repeats": arguments.repeats or (2 if cpu else 5)}


def _store(program: Program, name: str, config: NewLLMConfig, rows: list[dict[str, Any]]) -> None:
    program.results.setdefault("configs", {})[name] = {"config": config.to_dict(), "rows": rows}


def _on_cpu(program: Program) -> bool:
    return program.results["environment"]["platform"] == "cpu"


SWEEPS: dict[str, Callable[[Program, Configs], None]] = {
    "length": lengths, "batch": batches, "forms": forms, "phases": phases, "memory": generation, "plan": plans,
    "seeds": seeds,
}  # fmt: skip
