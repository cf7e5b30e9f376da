"""CASCADE's stage update and extraction beside PyTorch's: `python -m benchmarks.cascade` (`--help` tells the rest).

Without `--base_model` the base has random weights, and a stage trains on random hidden states of the published number:
neither time depends on the values, and the file says which they were.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import work
from benchmarks.comparison import complete, shares
from benchmarks.program import Program, has_torch, names, positive, run_program
from benchmarks.sweeps import MEMORY_LIMIT
from benchmarks.tables import benchmark_tables
from newllm_jax.config import CascadeConfig, load_config
from newllm_jax.smollm.alpaca import STRIDE
from newllm_jax.smollm.llama_config import LlamaConfig

PEERS = {"eager": "PyTorch eager", "graph": "PyTorch CUDA graph"}
MEASURED = ["extraction", "stage"]
PUBLISHED_CHUNKS, PUBLISHED_TOKENS = 1000, 76_800
CPU_CHUNKS, CPU_TOKENS = 8, 3_200


def main(argv: Sequence[str]) -> None:
    """Measures what the command line asks for, writes and prints it."""
    program = Program("cascade", "Time the extraction and the stage update of CASCADE beside PyTorch.")
    add = program.parser.add_argument
    add("--only", metavar="WHAT", default=",".join(MEASURED), help="of: %(default)s (default both)")
    add("--base_model", help="real weights instead of random ones, as for cascade.py")
    add("--dataset", help="of the real weights' chunks, as for cascade.py")
    add("--precision", default="auto", help="of the stage; the peers have fp32 and tf32 (default auto)")
    add("--peers", metavar="KINDS", default=",".join(PEERS), help="of: %(default)s; or none (default all)")
    add("--chunks", type=positive, help=f"that the base reads (default {PUBLISHED_CHUNKS}; on a CPU {CPU_CHUNKS})")
    add("--updates", type=positive, help="of the stage in a timed block (default 200; on a CPU 2)")
    add("--repeats", type=positive, help="timed blocks, passes (default 7; on a CPU 2)")
    add("--sweep", choices=["plan"], help="instead: the planned memory of the published runs")
    arguments = program.parse(argv).arguments
    peers = names(arguments.peers, list(PEERS), "peers")
    wanted = names(arguments.only, MEASURED, "only")
    overrides = {"precision": arguments.precision}
    overrides |= {name: getattr(arguments, name) for name in ("dataset", "base_model") if getattr(arguments, name)}
    config = load_config("published", overrides, config_class=CascadeConfig)
    with program:
        if arguments.sweep:
            program.name = "cascade-plan"
        environment = program.start(arguments.precision)
        if arguments.sweep:
            plans(program, overrides)
        else:
            compare(program, config, peers, wanted, environment)
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
    function = "benchmarks.{}_cascade:measure_extraction"
    ours = program.measure(function.format("ours"), task, "extraction: newllm_jax", fatal=True)
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
    function = "benchmarks.{}_cascade:measure_stage"
    ours = program.measure(function.format("ours"), task, "stage: newllm_jax", fatal=True)
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


def plans(program: Program, overrides: dict[str, Any]) -> None:
    """What `--dry_run` says the published runs need."""
    rows = []
    for name in ("published", "ratio09"):
        config = load_config(name, overrides, config_class=CascadeConfig)
        task = {"system": "cascade", "config": config.to_dict()}
        rows.append({"name": name, **program.measure("benchmarks.plans:measure", task, f"plan of {name}")})
    program.results |= {"benchmark": "cascade", "sweep": "plan", "limit_bytes": MEMORY_LIMIT, "rows": rows}


if __name__ == "__main__":
    sys.exit(run_program(main))
