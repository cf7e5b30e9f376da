"""What a phase of the time loop would take in thread-block clusters: `python -m benchmarks.clusters` (`--help`).

Needs an NVIDIA GPU of compute capability 9.0, and a JAX whose Pallas has `mosaic_gpu.async_store_smem`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.harness.program import Program, positive, run_program
from benchmarks.tables.benchmark import benchmark_tables

EXCHANGES = (  # how a block gets the others' columns
    "device memory",  # each block writes its columns, the cluster waits, each block loads all
    "device memory, multicast",  # each writes its columns, and loads them for all
    "shared memory",  # each block stores its columns in the shared memory of all others
    "none",  # results are wrong, and the time is that of product, weights and stored states
    "none, weights stay",  # that of product and stored states
)
SHAPES = {"baseline": (1, 32, 6), "advanced": (16, 32, 12)}  # clusters, rows of each, layers


def options() -> Program:
    """The program with its options; nothing is parsed or measured yet."""
    program = Program("clusters", "Time a phase of the time loop in thread-block clusters, by way of exchange.")
    program.parser.add_argument("--steps", type=positive, default=63, help="time steps (default %(default)s)")
    program.parser.add_argument("--repeats", type=positive, default=15, help="timed launches (default %(default)s)")
    return program


def main(argv: Sequence[str]) -> None:
    """Measures every way for both shapes, writes and prints it."""
    program = options().parse(argv)
    with program:
        program.start("auto")
        rows = program.results["rows"] = []
        for shape, (clusters, height, layers) in SHAPES.items():
            cases = [{"clusters": clusters, "rows": height, "layers": layers, "exchange": each} for each in EXCHANGES]
            task = {"cases": cases, "steps": program.arguments.steps, "repeats": program.arguments.repeats}
            found = program.measure("benchmarks.subjects.cluster_phases:measure", task, shape, fatal=True)
            rows += [{"shape": shape, **row} for row in found["rows"]]
            program.save()
        program.write(benchmark_tables(program.results))


if __name__ == "__main__":
    sys.exit(run_program(main))
