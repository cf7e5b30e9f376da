"""CASCADE on more hidden states than there is memory: `python -m benchmarks.memory_bound` (`--help` tells the rest).

Synthetic rows are written to disk, and a CASCADE on a base of one narrow layer reads all of them, in a process that is
refused memory beyond a bound. What it needs, in memory and on disk, does not depend on what the rows say.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from benchmarks.harness.program import Program, integers, positive, run_program
from benchmarks.subjects.bounded import LONGEST, SHORTEST, base_of_width, write_rows
from benchmarks.tables.benchmark import benchmark_tables
from newllm_jax.cascade.plan import plan_cascade
from newllm_jax.config import CascadeConfig
from newllm_jax.errors import InputError
from tests.reliability.tiny import write_base

GIB = 2**30


def options() -> Program:
    """The program with its options; nothing is parsed or measured yet."""
    program = Program("memory_bound", "Run CASCADE on synthetic rows in a process held to a bound of memory.")
    add = program.parser.add_argument
    add("--rows", default="52002", metavar="COUNTS", help="numbers of rows a,b, a run each (default %(default)s)")
    add("--width", default="576", metavar="WIDTHS", help="hidden size of each run a,b (default %(default)s)")
    add("--longest", type=positive, default=LONGEST, metavar="BYTES", help="bytes of a row (default %(default)s)")
    add("--bound", type=positive, default=4, metavar="GIB", help="GiB of memory of a run (default %(default)s)")
    add("--stages", type=positive, default=2, help="number of stages (default %(default)s)")
    return program


def main(argv: Sequence[str]) -> None:
    """Measures what the command line asks for, writes and prints it."""
    program = options().parse(argv)
    typed = program.arguments
    counts, widths = integers(typed.rows, "rows", 1), integers(typed.width, "width", 8)
    if typed.longest <= SHORTEST:
        raise InputError(f"longest: must be above {SHORTEST}, not {typed.longest}")
    if len(counts) != len(widths):
        raise InputError(f"width: {len(widths)} for {len(counts)} runs; one for each number of rows is wanted")
    with program:
        program.start("fp32", ceilings=False)
        program.results |= {
            "bound_bytes": typed.bound * GIB,
            "stages": typed.stages,
            "longest": typed.longest,
            "rows": [],
        }
        for rows, width in zip(counts, widths, strict=True):
            base, file = program.folder / f"base-{width}", program.folder / f"{rows}.jsonl"
            write_base(base, vars(base_of_width(width)))
            write_rows(file, rows, typed.longest)
            config = CascadeConfig(
                base_model=str(base), dataset=str(file), train_chunks=None, num_stages=typed.stages, stage_layers=1,
                batch_size=4096, learning_rate=1e-3, num_epochs=1,
            )  # fmt: skip
            task = {"config": config.to_dict(), "bound": typed.bound * GIB}
            found = program.measure("benchmarks.subjects.bounded:measure", task, f"{rows:,} rows, width {width}")
            planned = plan_cascade(config)
            shutil.rmtree(program.folder / "runs", ignore_errors=True)
            program.results["rows"].append({
                "name": f"{rows:,} rows, width {width}", "rows": rows, "width": width, "row_bytes": file.stat().st_size,
                "planned_disk_bytes": planned["estimated_disk_bytes"], **found,
            })  # fmt: skip
            file.unlink()
            program.save()
        program.write(benchmark_tables(program.results))


if __name__ == "__main__":
    sys.exit(run_program(main))
