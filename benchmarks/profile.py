"""Which kernels an update consists of: `python -m benchmarks.profile --what newllm:advanced`.

Reads the trace that JAX's profiler writes and prints, by kernel: launches per update and per time step, microseconds,
share of the time in kernels; and how much of the time the GPU is idle between kernels.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.program import Program, positive, run_program
from newllm_jax.errors import InputError
from newllm_jax.report.tables import markdown_table

WHATS = ("newllm:baseline", "newllm:advanced", "cascade:stage", "cascade:extraction")
VOCABULARY = 1000


@dataclass(frozen=True)
class Kernel:
    """One interval of a trace, in microseconds."""

    name: str
    start: float
    duration: float


def main(argv: Sequence[str]) -> None:
    """Traces what the command line asks for, and prints the kernels."""
    program = Program("profile", "Print the kernels of an update, from a trace of JAX's profiler.")
    add = program.parser.add_argument
    add("--what", choices=WHATS, default=WHATS[1], help="default %(default)s")
    add("--updates", type=positive, help="traced (default 5; on a CPU 1); of the extraction: batches of chunks")
    add("--precision", default="auto", help="as for train.py")
    add("--top", type=positive, default=30, help="kernels to print, by time (default 30)")
    add("--trace", metavar="DIR", help="keeps the trace there, for Perfetto or TensorBoard")
    arguments = program.parse(argv).arguments
    with program:
        environment = program.start(arguments.precision, ceilings=False)
        folder = Path(arguments.trace).absolute() if arguments.trace else program.folder / "trace"
        updates = arguments.updates or (1 if environment["platform"] == "cpu" else 5)
        task = {"what": arguments.what, "updates": updates, "precision": arguments.precision}
        task["trace"] = str(folder)
        steps = program.measure("benchmarks.profile:measure", task, f"trace of {arguments.what}", fatal=True)
        kernels, device = read_trace(folder)
        program.results |= {"what": arguments.what, "updates": updates, **steps, "of": device}
        program.results |= summary(kernels, updates, steps["steps"])
        text = profile_text(program.results, arguments.top)
        if arguments.output:
            program.write(text)
        else:
            print(text)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Runs the updates once to compile and warm up, then under the profiler. In a worker."""
    import jax

    system, name = task["what"].split(":")
    run, steps, unit, precision = (newllm if system == "newllm" else cascade)(name, task)
    run()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # its events would crowd out the kernels
    with jax.profiler.trace(task["trace"], profiler_options=options):
        run()
    return {"steps": steps, "unit": unit, "precision": precision}


def newllm(name: str, task: dict[str, Any]) -> tuple[Callable[[], Any], int, str, str]:
    """The updates of a configuration on synthetic ids."""
    import numpy as np

    from benchmarks.ours_newllm import training
    from newllm_jax.config import load_config
    from newllm_jax.newllm.updates import training_precision

    config = load_config(name, {"precision": task["precision"]})
    shape = (config.batch_size, config.sequence_length)
    sequences = np.random.default_rng(0).integers(1, VOCABULARY, shape).astype(np.uint16)
    updates = task["updates"]
    ours = training(config, VOCABULARY, sequences, 2 * updates)
    ours.prepare()
    return lambda: ours.run(updates), config.sequence_length - 1, "time step", training_precision(config)


def cascade(name: str, task: dict[str, Any]) -> tuple[Callable[[], Any], int, str, str]:
    """The updates of a stage, or batches of chunks through a base with random weights."""
    from benchmarks.ours_cascade import base_and_chunks, stage_training, synthetic_tokens
    from newllm_jax.cascade.extraction import batch_chunks, extract
    from newllm_jax.config import CascadeConfig
    from newllm_jax.smollm.llama_config import LlamaConfig
    from newllm_jax.training.precision import resolve_precision

    config, updates = CascadeConfig(precision=task["precision"]), task["updates"]
    if name == "stage":
        path = str(Path(task["folder"]) / "tokens.npz")
        synthetic_tokens(path, config.batch_size, LlamaConfig())
        ours = stage_training(config, LlamaConfig(), path, 2 * updates)
        ours.prepare()
        return lambda: ours.run(updates), config.stage_layers, "layer", resolve_precision(config.precision)
    base, params, chunks = base_and_chunks(config.override({"train_chunks": updates * batch_chunks()}), real=False)
    return lambda: extract(base, params, chunks, config.criterion), base.config.num_layers, "layer", "fp32"


def read_trace(folder: Path) -> tuple[list[Kernel], str]:
    """The kernels of a GPU's streams; of a CPU, what its threads record.

    Raises:
      InputError: no trace, or nothing in it.
    """
    files = sorted(folder.rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise InputError(f"trace: JAX's profiler left no *.trace.json.gz in {folder}")
    with gzip.open(files[-1], "rt", encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    processes, threads = _labels(events)
    # On a GPU, lines such as "XLA Ops" repeat what the streams hold, so that only the streams are read.
    streams = {
        key for key, label in threads.items()
        if "/device:" in processes.get(key[0], "") and label.startswith("Stream")
    }  # fmt: skip
    lines = streams or {key for key in threads if "XLA" in threads[key] or "Eigen" in threads[key]}
    kernels = [
        Kernel(event["name"], float(event["ts"]), float(event.get("dur", 0)))
        for event in events
        if event.get("ph") == "X" and (event["pid"], event.get("tid")) in lines and "Thunk" not in event["name"]
    ]  # fmt: skip
    if not kernels:
        raise InputError(f"trace: {files[-1]} holds no kernels; its lines are {sorted(set(threads.values()))}")
    return kernels, "GPU streams" if streams else "CPU threads (coarse: events of a loop lie inside it)"


def _labels(events: list[dict[str, Any]]) -> tuple[dict[int, str], dict[tuple[int, int], str]]:
    """Names of processes, and of threads by process."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    return processes, threads


def summary(kernels: list[Kernel], updates: int, steps: int) -> dict[str, Any]:
    """By kernel name (numbers at its end apart, so that unrolled copies are one): launches and time; and idle time."""
    durations: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        durations[re.sub(r"([._]\d+)+$", "", kernel.name)].append(kernel.duration)
    total = sum(kernel.duration for kernel in kernels)
    start = min(kernel.start for kernel in kernels)
    span = max(kernel.start + kernel.duration for kernel in kernels) - start
    rows = [
        {
            "kernel": name, "per_update": len(times) / updates, "per_step": len(times) / updates / steps,
            "total_us_per_update": sum(times) / updates, "mean_us": sum(times) / len(times),
            "share": sum(times) / total if total else 0.0,
        }
        for name, times in sorted(durations.items(), key=lambda item: -sum(item[1]))
    ]  # fmt: skip
    return {
        "span_us_per_update": span / updates,
        "busy_us_per_update": busy(kernels) / updates,
        "idle_share": 1 - busy(kernels) / span if span else 0.0,
        "kernels_per_update": len(kernels) / updates,
        "kernels": rows,
    }


def busy(kernels: list[Kernel]) -> float:
    """Microseconds in which at least one kernel runs: streams may overlap."""
    covered, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        stop = kernel.start + kernel.duration
        covered += max(0.0, stop - max(kernel.start, end))
        end = max(end, stop)
    return covered


def profile_text(results: dict[str, Any], top: int) -> str:
    """What is printed: the line of totals, and the kernels that take the most time."""
    header = ["kernel", "per update", f"per {results['unit']}", "total, us", "mean, us", "share"]
    table = markdown_table(header, [
        [
            row["kernel"][:80], f"{row['per_update']:,.1f}", f"{row['per_step']:.2f}",
            f"{row['total_us_per_update']:,.1f}", f"{row['mean_us']:.2f}", f"{row['share']:.1%}",
        ]
        for row in results["kernels"][:top]
    ])  # fmt: skip
    left = len(results["kernels"]) - top
    return (
        f"{results['what']}, {results['environment']['device']}, {results['precision']}, "
        f"{results['updates']} updates, {results['of']}\n"
        f"an update: {results['span_us_per_update']:,.0f} us from its first kernel to its last, "
        f"{results['busy_us_per_update']:,.0f} us in {results['kernels_per_update']:,.0f} kernels, "
        f"idle {results['idle_share']:.1%}\n\n{table}" + (f"\n\n{left} more (--top)" if left > 0 else "")
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
