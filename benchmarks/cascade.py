"""CASCADE's stage update and extraction beside PyTorch's: `python -m benchmarks.cascade` (options: `--help`).

Without `--base_model` the base has random weights, and a stage trains on random hidden states of the published number:
neither time depends on the values, and the file says which they were.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import work
from benchmarks.harness.comparison import complete, shares
from benchmarks.harness.program import Program, has_torch, integers, names, positive, run_program
from benchmarks.harness.sweeps import MEMORY_LIMIT, run_command
from benchmarks.tables.benchmark import benchmark_tables
from newllm_jax.config import CascadeConfig, load_config
from newllm_jax.smollm.alpaca import STRIDE
from newllm_jax.smollm.llama_config import LlamaConfig

PEERS = {"eager": "PyTorch eager", "graph": "PyTorch CUDA graph"}
MEASURED = ["extraction", "stage"]
PUBLISHED_CHUNKS, PUBLISHED_TOKENS = 1000, 76_800
CPU_CHUNKS, CPU_TOKENS = 8, 3_200


def options() -> Program:
    """The program with its options; nothing is parsed or measured yet."""
    program = Program("cascade", "Time the extraction and the stage update of CASCADE beside PyTorch.", "[SWEEP-]")
    add = program.parser.add_argument
    add("--config", default="published", help="configuration, a name or a file (default %(default)s)")
    add("--only", metavar="WHAT", default=",".join(MEASURED), help="parts to measure (default %(default)s)")
    add("--base_model", help="base model with real weights, as for cascade.py (default: random weights; in "
        "sweeps the configuration's)")  # fmt: skip
    add("--dataset", help="data set that a base model with real weights reads, as for cascade.py")
    add("--precision", default="auto", help="precision of the stage, as for cascade.py (default auto); PyTorch is "
        "measured in fp32 where this is fp32, else in tf32")  # fmt: skip
    add("--peers", metavar="KINDS", default=",".join(PEERS), help="PyTorch variants to measure (default %(default)s), "
        "or none")  # fmt: skip
    add("--chunks", type=positive, help=f"number of chunks that the base reads (default {PUBLISHED_CHUNKS}; on a CPU "
        f"{CPU_CHUNKS})")  # fmt: skip
    add("--updates", type=positive, help="number of stage updates in a timed block (default 200; on a CPU 2)")
    add("--repeats", type=positive, help="number of timed blocks and passes (default 7; on a CPU 2)")
    add("--sweep", choices=list(SWEEPS), help="measure this instead: planned memory; whole runs by seed")
    add("--seeds", default="0,1", help="seeds of --sweep seeds (default %(default)s)")
    return program


def main(argv: Sequence[str]) -> None:
    """Measures what the command line asks for, writes and prints it."""
    program = options().parse(argv)
    arguments = program.arguments
    peers = names(arguments.peers, list(PEERS), "peers")
    wanted = names(arguments.only, MEASURED, "only")
    arguments.seeds = integers(arguments.seeds, "seeds", 0)
    overrides = {"precision": arguments.precision}
    overrides |= {name: getattr(arguments, name) for name in ("dataset", "base_model") if getattr(arguments, name)}
    config = load_config(arguments.config, overrides, config_class=CascadeConfig)
    with program:
        if arguments.sweep:
            program.name = f"cascade-{arguments.sweep}"
            program.start(arguments.precision, ceilings=False)
            program.results |= {"benchmark": "cascade", "sweep": arguments.sweep}
            SWEEPS[arguments.sweep](program, config)
        else:
            compare(program, config, peers, wanted, program.start(arguments.precision))
        program.write(benchmark_tables(program.results))


def compare(
    program: Program, config: CascadeConfig, peers: list[str], wanted: list[str], environment: dict[str, Any]
) -> None:
    """The extraction, then the stage on what it left (or on random hidden states)."""
    arguments, cpu = program.arguments, environment["platform"] == "cpu"
    real = bool(arguments.base_model)
    chunks = arguments.chunks or (CPU_CHUNKS if cpu else PUBLISHED_CHUNKS)
    config = config.override({"train_chunks": chunks})
    task = {
        "config": config.to_dict(), "precision": arguments.precision, "real": real,
        "repeats": arguments.repeats or (2 if cpu else 7), "updates": arguments.updates or (2 if cpu else 200),
        "agreement_updates": 1 if cpu else 16, "llama": dataclasses.asdict(LlamaConfig()),
        "token_count": CPU_TOKENS if cpu else PUBLISHED_TOKENS,
        **{what: str(program.folder / f"{what}.npz") for what in ("tokens", "weights")},
        "order": str(program.folder / "order.npy"),
    }  # fmt: skip
    program.results["values"] = f"real: {config.base_model} on {config.dataset}" if real else "random"
    if "extraction" in wanted or real:
        entry = extraction(program, task | {"repeats": min(task["repeats"], 3)}, peers)
        program.results["extraction"], task["llama"] = entry, entry["rows"][0]["llama"]
    program.results["configs"] = {"stage 1": stage(program, task, peers, cpu)} if "stage" in wanted else {}


def extraction(program: Program, task: dict[str, Any], peers: list[str]) -> dict[str, Any]:
    """One pass of the frozen base over the chunks, strict float32: the library's, then transformers'."""
    function = "benchmarks.subjects.{}_cascade:measure_extraction"
    ours = program.measure(function.format("jax"), task, "extraction: newllm_jax", fatal=True)
    rows = [{"name": "newllm_jax", **ours}]
    if has_torch() and peers:
        peer = task | {"batch_chunks": ours["batch_chunks"]}
        rows.append({"name": "transformers eager",
                     **program.measure(function.format("torch"), peer, "extraction: transformers")})  # fmt: skip
    tokens, full = ours["chunks"] * STRIDE, PUBLISHED_CHUNKS * STRIDE
    counted = work.extraction(LlamaConfig(**ours["llama"]), ours["chunks"], STRIDE, ours["batch_chunks"])
    for row in rows:
        if "error" not in row:
            seconds = row["pass_seconds"]["median"]
            row |= {"full_seconds": seconds * full / tokens, "times_ours": seconds / ours["pass_seconds"]["median"]}
            row |= shares(counted, seconds, "fp32", program.results["ceilings"])
    return {
        "tokens": tokens, "full_tokens": full, "flops": counted.flops, "bytes": counted.bytes, "rows": rows
    }  # fmt: skip


def stage(program: Program, task: dict[str, Any], peers: list[str], cpu: bool) -> dict[str, Any]:
    """The update of stage 1: the library's, then the peers'."""
    function = "benchmarks.subjects.{}_cascade:measure_stage"
    ours = program.measure(function.format("jax"), task, "stage: newllm_jax", fatal=True)
    rows = [{"name": "newllm_jax", **ours}]
    for kind in peers if has_torch() else []:
        if cpu and kind == "graph":
            row = {"error": "needs a CUDA device"}
        else:
            row = program.measure(function.format("torch"), task | {"kind": kind}, f"stage: {PEERS[kind]}")
        rows.append({"name": PEERS[kind], "kind": kind, **row})
    config = task["config"]
    llama = LlamaConfig(**{**task["llama"], "num_layers": config["stage_layers"]})
    counted = work.stage_update(llama, config["batch_size"])
    steps = -(-PUBLISHED_TOKENS // config["batch_size"])
    complete(rows, steps, counted, program.results["ceilings"])
    return {
        "config": config, "updates_per_epoch": steps, "flops_per_update": counted.flops,
        "bytes_per_update": counted.bytes, "rows": rows,
    }  # fmt: skip


def plans(program: Program, config: CascadeConfig) -> None:
    """What `--dry_run` says the published runs need."""
    rows = []
    for name in ("published", "ratio09"):
        chosen = {key: getattr(config, key) for key in ("precision", "dataset", "base_model")}
        task = {"system": "cascade", "config": load_config(name, chosen, config_class=CascadeConfig).to_dict()}
        rows.append({"name": name, **program.measure("benchmarks.subjects.plans:measure", task, f"plan of {name}")})
    program.results |= {"limit_bytes": MEMORY_LIMIT, "rows": rows}


def seeds(program: Program, config: CascadeConfig) -> None:
    """Whole runs, one for each seed; the file is written anew after each."""
    arguments, rows = program.arguments, []
    program.results["rows"] = rows
    for seed in arguments.seeds:
        task = {"config": config.override({"seed": seed}).to_dict()}
        row = program.measure("benchmarks.subjects.runs:cascade", task, f"a run with seed {seed}")
        typed = {"base_model": arguments.base_model, "dataset": arguments.dataset, "seed": seed}
        command = run_command("cascade.py", arguments.config, typed | {"precision": arguments.precision})
        rows.append({"config": arguments.config, "seed": seed, **row, "command": command})
        program.save()


SWEEPS: dict[str, Callable[[Program, CascadeConfig], None]] = {"plan": plans, "seeds": seeds}


if __name__ == "__main__":
    sys.exit(run_program(main))
