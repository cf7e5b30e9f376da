"""An update on one device and on several, the same batch on all together: `python -m benchmarks.devices`.

Both are timed in turns in one process. On a CPU, whose devices are simulated, only the program is tried.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.program import Program, integers, names, positive, run_program
from benchmarks.subjects.devices import WORKS
from benchmarks.tables.devices import speedup_table
from newllm_jax.errors import InputError

BATCHES = {  # on all devices together; of a sweep: members
    "cascade": [16, 32, 64, 128, 256], "lora": [16, 32, 64, 128, 256], "finetune": [16, 32, 64, 128, 256],
    "wikitext2": [64, 256, 512, 1024], "sweep": [16], "small_sweep": [16, 64], 
    "advanced": [32, 128, 512, 1024, 2048, 4096],
}  # fmt: skip
UPDATES = {"advanced": 10, "wikitext2": 10, "sweep": 5, "small_sweep": 20}
FEW = 8  # updates of a block, for works with no number of their own


def options() -> Program:
    """The program with its options; nothing is parsed yet."""
    program = Program("devices", "Time updates on one device and on several.", "")
    add = program.parser.add_argument
    add("--works", default=",".join(WORKS), help=f"what is trained (default {','.join(WORKS)})")
    add("--devices", default="1,2", help="numbers of devices (default %(default)s)")
    add("--batches", help="batch sizes in the place of each work's own")
    add("--device_batch", type=positive, help="most examples that a device computes at a time; more are computed one "
        "part after another, as --micro_batch does")  # fmt: skip
    add("--fsdp", action="store_true", help="also divide weights and moments over the devices")
    add("--repeats", type=positive, default=7, help="timed blocks of updates (default %(default)s)")
    return program


def main(argv: Sequence[str]) -> None:
    """Measures, writes after every batch, and prints the table. Raises InputError."""
    program = options().parse(argv)
    typed = program.arguments
    works, devices = names(typed.works, WORKS, "works"), integers(typed.devices, "devices", 1)
    with program:
        program.start(ceilings=False)
        rows = program.results["rows"] = []
        for work in works:
            for batch in integers(typed.batches, "batches", 1) if typed.batches else BATCHES[work]:
                task = {"work": work, "batch": batch, "devices": devices, "repeats": typed.repeats,
                        "updates": UPDATES.get(work, FEW), "device_batch": typed.device_batch,
                        "fsdp": typed.fsdp}  # fmt: skip
                found = program.measure("benchmarks.subjects.devices:measure", task, f"{work}, batch {batch:,}")
                failed = [{"work": work, "batch": batch, "devices": each, "error": found.get("error")}
                          for each in devices]  # fmt: skip
                rows += found.get("rows", failed)
                program.save()
        if all("error" in row for row in rows):
            raise InputError(f"devices: nothing could be measured; the first: {rows[0]['error']}")
        program.write(speedup_table(program.results))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
