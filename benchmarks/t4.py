"""What training would take on a Tesla T4, from programs compiled for one: `python -m benchmarks.t4` (`--help`).

No T4 is needed, but JAX's compiler for NVIDIA GPUs is, which `jax[cuda13]` brings. Nothing is timed: the kernels of an
update and the bytes that they move are counted, and `benchmarks.tables.t4` estimates from that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.harness.program import RESULTS, Program, configurations, names, run_program
from benchmarks.harness.t4 import FLOPS
from benchmarks.tables.t4 import estimates
from newllm_jax.errors import InputError


def options() -> Program:
    """The program with its options; nothing is parsed or compiled yet."""
    program = Program("t4", "Count kernels and bytes of updates compiled for a Tesla T4.", file=RESULTS / "t4.json")
    add = program.parser.add_argument
    add("--config", metavar="NAMES", help="configurations a,b, names or files (default advanced,baseline)")
    add("--precision", metavar="NAMES", default=",".join(FLOPS), help="precisions a,b (default %(default)s)")
    return program


def main(argv: Sequence[str]) -> None:
    """Compiles what the command line asks for, writes and prints the estimates."""
    program = options().parse(argv)
    precisions = names(program.arguments.precision, list(FLOPS), "precision")
    if not precisions:
        raise InputError("precision: names no precision")
    configs = configurations(program.arguments.config or "advanced,baseline", {"precision": "fp32"})
    with program:
        program.start("fp32", ceilings=False)
        rows = program.results["rows"] = []
        for name, config in configs.items():
            for precision in precisions:
                task = {"config": config.to_dict(), "precision": precision}
                found = program.measure(
                    "benchmarks.subjects.t4_program:measure", task, f"{name}, {precision}", fatal=True
                )
                rows.append({"config": name, "precision": precision, **found})
                program.save()
        program.write(estimates(rows))


if __name__ == "__main__":
    sys.exit(run_program(main))
