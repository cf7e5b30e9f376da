"""Which kernels an update consists of: `python -m benchmarks.profile --what newllm:advanced`.

Reads the trace that JAX's profiler writes, and gives for each kernel its launches per update and per time step, its
microseconds and its share of the time in kernels; and how much of the time the GPU is idle between kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.program import Program, positive, run_program
from benchmarks.harness.trace import read_trace, summary
from newllm_jax.report.tables import markdown_table

WHATS = ("newllm:baseline", "newllm:advanced", "newllm:wikitext2", "cascade:stage", "cascade:extraction")


def options() -> Program:
    """The program with its options; nothing is parsed or measured yet."""
    program = Program("profile", "Print the kernels of an update, from a trace of JAX's profiler.", "PART-[PRECISION-]")
    add = program.parser.add_argument
    add("--what", choices=WHATS, default=WHATS[1], help="system and part to trace (default %(default)s)")
    add("--updates", type=positive, help="number of updates to trace, or of batches of chunks (default 5; on a CPU 1)")
    add("--precision", default="auto", help="precision, as for train.py (default auto)")
    add("--top", type=positive, default=30, help="number of kernels to print, those that take longest (default 30)")
    add("--trace", metavar="DIR", help="folder to keep the trace in, for Perfetto or TensorBoard (default: none)")
    return program


def main(argv: Sequence[str]) -> None:
    """Traces what the command line asks for, writes and prints the kernels."""
    program = options().parse(argv)
    arguments = program.arguments
    program.name = f"profile-{arguments.what.split(':')[1]}"
    if arguments.precision != "auto":
        program.name += f"-{arguments.precision}"
    with program:
        environment = program.start(arguments.precision, ceilings=False)
        folder = Path(arguments.trace).absolute() if arguments.trace else program.folder / "trace"
        updates = arguments.updates or (1 if environment["platform"] == "cpu" else 5)
        task = {"what": arguments.what, "updates": updates, "precision": arguments.precision, "trace": str(folder)}
        steps = program.measure("benchmarks.subjects.traced:measure", task, f"trace of {arguments.what}", fatal=True)
        kernels, device = read_trace(folder)
        program.results |= {"benchmark": "profile", "what": arguments.what, "updates": updates, **steps, "of": device}
        program.results |= summary(kernels, updates, steps["steps"])
        program.write(profile_text(program.results, arguments.top))


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
