"""Updates of New-LLM beside PyTorch's: `python -m benchmarks.newllm` (`--help` tells the rest).

Every row makes the same updates: same data, same batches, same initial weights, dropout on. The losses are recorded,
and so are those without dropout, which must agree to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import work
from benchmarks.harness.comparison import complete
from benchmarks.harness.program import Program, configurations, has_torch, names, positive, run_program
from benchmarks.harness.sweeps import SWEEPS, run_sweep
from benchmarks.harness.timing import updates_needed
from benchmarks.subjects.jax_newllm import orders, steps_per_epoch
from benchmarks.tables.benchmark import benchmark_tables
from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm.wikitext import Wikitext, load_wikitext
from newllm_jax.training.precision import PRECISIONS

PEERS = {
    "eager": "PyTorch eager",
    "compile": "PyTorch, time step compiled",
    "graph": "PyTorch CUDA graph",
    "compiled_graph": "PyTorch CUDA graph, time step compiled",
    "lstm": "PyTorch LSTM 2x512, for scale",
}


def options() -> Program:
    """The program with its options; nothing is parsed or measured yet."""
    program = Program("newllm", "Time updates of New-LLM beside re-creations in PyTorch.", "[SWEEP-]")
    add = program.parser.add_argument
    add("--config", metavar="NAMES", help="configurations a,b, names or files (default baseline,advanced; "
        "baseline alone on a CPU and for the sweeps length and memory)")  # fmt: skip
    add("--dataset", help="data set: Hub name, folder, file or builtin (default: the configuration's)")
    add("--precision", default="auto", help="precision of the library, as for train.py (default auto); PyTorch is "
        "measured in fp32 where this is fp32, else in tf32")  # fmt: skip
    add("--also", metavar="NAMES", default="none", help="further precisions a,b of the library (default none)")
    add("--peers", metavar="KINDS", default=",".join(PEERS), help="PyTorch variants to measure (default %(default)s), "
        "or none")  # fmt: skip
    add("--updates", type=positive, help="number of updates in a timed block (default 50; in sweeps 20; on a CPU 3, 1)")
    add("--repeats", type=positive, help="number of timed blocks (default 5; on a CPU 3, in sweeps 2)")
    add("--compile_limit", type=positive, default=180, metavar="SECONDS", help="seconds after which a row of "
        "torch.compile is given up (default 180)")  # fmt: skip
    add("--sweep", choices=list(SWEEPS), help="measure this instead: updates by text length, by batch size or by form "
        "of the time loop; what its waits take; memory of generation; planned memory; runs by seed")  # fmt: skip
    add("--sizes", help="text lengths, or batch sizes, of the sweeps length, batch and forms, 64,128,...")
    add("--seeds", help="seeds of --sweep seeds, 0,1,... (default 0 to 9 of advanced, 0 to 2 of others)")
    add("--tokens", type=positive, help="words that --sweep memory generates (default 1000000; on a CPU 2000)")
    return program


def main(argv: Sequence[str]) -> None:
    """Measures what the command line asks for, writes and prints it."""
    program = options().parse(argv)
    peers = names(program.arguments.peers, list(PEERS), "peers")
    names(program.arguments.also, list(PRECISIONS), "also")
    overrides = {"dataset": program.arguments.dataset} if program.arguments.dataset else {}
    overrides["precision"] = program.arguments.precision
    configs = configurations(program.arguments.config, overrides)
    with program:
        if program.arguments.sweep:
            run_sweep(program, configs)
        else:
            compare(program, configs, peers)
        program.write(benchmark_tables(program.results))


def compare(program: Program, configs: dict[str, NewLLMConfig], peers: list[str]) -> None:
    """The rows of every configuration: the library, then each peer.

    Raises:
      InputError: a configuration whose learning rate changes, which the peers do not do.
    """
    for name, config in configs.items():
        if config.schedule != "constant" or config.warmup_steps:
            raise InputError(f"config: {name} has a learning rate that changes; the peers have a constant one")
    environment = program.start(program.arguments.precision)
    cpu = environment["platform"] == "cpu"
    if cpu and not program.arguments.config:
        configs = {"baseline": configs["baseline"]}
    updates = program.arguments.updates or (3 if cpu else 50)
    repeats = program.arguments.repeats or (3 if cpu else 5)
    program.results["configs"] = {}
    for name, config in configs.items():
        data = load_wikitext(config)
        task = prepare(program, name, config, data, (updates, repeats, 2 if cpu else 16))
        task["precision"] = program.arguments.precision
        ours = program.measure("benchmarks.subjects.jax_newllm:measure", task, f"{name}: newllm_jax", fatal=True)
        rows = [{"name": "newllm_jax", **ours}]
        for precision in names(program.arguments.also, list(PRECISIONS), "also"):
            other = task | {"config": config.override({"precision": precision}).to_dict()}
            row = program.measure("benchmarks.subjects.jax_newllm:measure", other, f"{name}: newllm_jax, {precision}")
            rows.append({"name": "newllm_jax", **row})
        for kind in peers if has_torch() else []:
            limit = program.arguments.compile_limit if "compile" in kind else None
            if cpu and "graph" in kind:
                row = {"error": "needs a CUDA device"}
            else:
                peer = task | {"kind": kind}
                row = program.measure("benchmarks.subjects.torch_newllm:measure", peer, f"{name}: {PEERS[kind]}", limit)
            rows.append({"name": PEERS[kind], "kind": kind, "another_model": kind == "lstm", **row})
        program.results["configs"][name] = describe(config, data, rows, program.results)
        program.save()


def prepare(
    program: Program, name: str, config: NewLLMConfig, data: Wikitext, counts: tuple[int, int, int]
) -> dict[str, Any]:
    """Writes data and order of the batches for all rows; returns the task that they share.

    Args:
      counts: updates in a timed block, blocks, and updates of the curve without dropout.
    """
    stem = Path(name).stem
    sequences, (updates, repeats, curve) = data.sequences["train"], counts
    files = {what: str(program.folder / f"{stem}-{what}.npy") for what in ("sequences", "order")}
    np.save(files["sequences"], sequences)
    np.save(files["order"], orders(config.seed, len(sequences), config.batch_size, updates_needed(*counts)))
    return {
        **files, "weights": str(program.folder / f"{stem}-weights.npz"), "config": config.to_dict(),
        "vocabulary": len(data.tokenizer), "updates": updates, "repeats": repeats, "agreement_updates": curve,
    }  # fmt: skip


def describe(
    config: NewLLMConfig, data: Wikitext, rows: list[dict[str, Any]], results: dict[str, Any]
) -> dict[str, Any]:
    """A configuration's entry in the results: what an update is, and the rows with what follows from their times."""
    train = data.sequences["train"]
    counted, steps = work.newllm_update(config, len(data.tokenizer)), steps_per_epoch(config, len(train))
    complete(rows, steps, counted, results["ceilings"])
    for row in rows:
        if "error" not in row:
            row["tokens_per_second"] = np.count_nonzero(train[:, 1:]) / row["epoch_seconds"]
    return {
        "config": config.to_dict(), "data": data.summary(config), "updates_per_epoch": steps,
        "flops_per_update": counted.flops, "bytes_per_update": counted.bytes, "rows": rows,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_program(main))
