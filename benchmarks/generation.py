"""Tokens a second of SmolLM2 and CASCADE making text: `python -m benchmarks.generation` (options: `--help`).

Beside them, where PyTorch is installed, `generate` of transformers with the same weights.

The weights are random, in the shapes of SmolLM2-135M: the time does not depend on them. Each form of the products is
measured in processes of its own, with XLA's options for CUDA graphs varied; then the fastest form is, with other
numbers of tokens a call, with sampling, and with batches and stages where it has those. The file is written anew after
every process.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

from benchmarks.harness.program import Program, has_torch, names, positive, run_program
from benchmarks.subjects.jax_generation import FORMS, ONE_KERNEL, PROMPT
from benchmarks.tables.benchmark import benchmark_tables
from newllm_jax.config import CascadeConfig, check
from newllm_jax.smollm.generate import cache_capacity
from newllm_jax.smollm.llama_config import LlamaConfig

CASE = {"precision": "fp32", "batch": 1, "per_call": 16, "graphs": "XLA's choice", "sampling": "greedy"}
HOST_LOOP, FORM = (f"benchmarks.subjects.jax_generation:{name}" for name in ("measure_host_loop", "measure"))
PEER = "benchmarks.subjects.torch_generation:measure"
BATCH = 32
ALL_FORMS = *FORMS, ONE_KERNEL
ENOUGH = 32  # tokens that are the same: a near tie may part two right texts at last
LONGEST_PROCESS = 150  # seconds, where the time is nearly up; one that is ended leaves no row


def options() -> Program:
    """The program with its options; nothing is parsed or measured yet."""
    program = Program("generation", "Time SmolLM2 and CASCADE making text, by form of the products and CUDA graphs.")
    add = program.parser.add_argument
    add("--forms", metavar="NAMES", default=",".join(name.replace(",", ";") for name in ALL_FORMS), help="forms of the "
        "products to measure (default %(default)s; a semicolon stands for a comma)")  # fmt: skip
    add("--tokens", type=positive, help="tokens of a text (default 256; on a CPU 32)")
    add("--repeats", type=positive, help="number of timed texts (default 3; on a CPU 1)")
    add("--layers", type=positive, default=LlamaConfig().num_layers, help="layers of the model (default %(default)s)")
    add("--limit", type=positive, default=420, help="seconds after which no further process is started (default "
        "%(default)s)")  # fmt: skip
    return program


def main(argv: Sequence[str]) -> None:
    """Measures what the command line asks for, writes and prints it."""
    started, program = time.monotonic(), options().parse(argv)
    arguments = program.arguments
    forms = [name.replace(";", ",") for name in names(arguments.forms, [each.replace(",", ";") for each in ALL_FORMS],
                                                      "forms")]  # fmt: skip
    with program:
        cpu = program.start("fp32")["platform"] == "cpu"
        tokens = arguments.tokens or (32 if cpu else 256)
        task = {
            "llama": dataclasses.asdict(LlamaConfig(num_layers=arguments.layers)), "tokens": tokens,
            "capacity": cache_capacity(PROMPT + tokens),
            "repeats": arguments.repeats or (1 if cpu else 3),
        }  # fmt: skip
        if cpu:
            forms = [form for form in forms if form != ONE_KERNEL]
            check("forms", arguments.forms, f"more than '{ONE_KERNEL}', which needs a GPU", bool(forms))
        program.results |= {"task": task, "rows": []}
        Rows(program, task, started + arguments.limit).measure_all(forms, cpu)
        program.write(benchmark_tables(program.results))


class Rows:
    """The rows as they come, until the time is up.

    Attributes:
      rows: those that were measured; also in the program's results.
    """

    def __init__(self, program: Program, task: dict[str, Any], end: float) -> None:
        self.program, self.task, self.end = program, task, end
        self.rows: list[dict[str, Any]] = program.results["rows"]

    def measure_all(self, forms: Sequence[str], cpu: bool) -> None:
        """The loop of before, ours, and the peer at last: it takes longest, and the time may be up."""
        self.add(HOST_LOOP, {}, "host asked per token")
        self._measure_forms(forms, cpu)
        if has_torch():
            changes = {}, {"sampling": "top_p"}, *([] if cpu else [{"precision": "bf16"}])
            cases = [CASE | {"per_call": 1, "graphs": "-"} | change for change in changes]
            self.add(PEER, {"cases": cases}, "transformers")

    def _measure_forms(self, forms: Sequence[str], cpu: bool) -> None:
        """Each form, then variations of the fastest."""
        layers = CascadeConfig().stage_layers
        if cpu:
            for form in forms:
                self.add_form(form, {})
            if best := self.fastest(FORMS):
                self.add_form(best["form"], {"per_call": 4}, {"sampling": "top_p"}, {"stage_layers": layers})
            return
        for form in forms:
            batches = [] if form == ONE_KERNEL else [{"batch": BATCH}]
            self.add_form(form, {}, {"graphs": "every kernel"}, {"precision": "bf16"}, *batches)
        for form in forms:  # apart, for some versions of XLA crash here
            self.add_form(form, {"graphs": "the loop"})
        if best := self.fastest(ALL_FORMS):
            form, graphs = best["form"], {"graphs": best["graphs"]}
            changes = *({"per_call": count} for count in (4, 8, 64)), {"sampling": "top_p"}, {"precision": "bf16"}
            self.add_form(form, *(graphs | change for change in changes))
        if best := self.fastest(FORMS):  # those that have batches and stages
            form, graphs = best["form"], {"graphs": best["graphs"]}
            self.add_form(form, *(graphs | {"batch": BATCH} | change for change in ({}, {"precision": "bf16"})))
            self.add_form(form, {"graphs": "every kernel", "stage_layers": layers})
            self.add_form(form, {"graphs": "conditionals", "stage_layers": layers})
            self.add_form(form, {"graphs": "nothing"}, {"graphs": "the loop, unrolled"})

    def fastest(self, forms: Collection[str]) -> dict[str, Any] | None:
        """The row of these forms with the most tokens a second of one text in strict float32, begun as the first is."""
        found = [
            row for row in self.rows
            if row.get("same_tokens", 0) >= min(ENOUGH, self.task["tokens"]) and row["form"] in forms
            and all(row[key] == CASE[key] for key in ("precision", "batch", "per_call", "sampling"))
        ]  # fmt: skip
        return max(found, key=lambda row: row["tokens_per_second"]["median"], default=None)

    def add_form(self, form: str, *changes: dict[str, Any]) -> None:
        """Cases that differ from `CASE`, of one form, in one process."""
        cases = [CASE | change for change in changes]
        self.add(FORM, {"form": form, "cases": cases}, f"{form}, {len(cases)} cases")

    def add(self, function: str, task: dict[str, Any], what: str) -> None:
        """The rows of one process; nothing where the time is up."""
        left = self.end - time.monotonic()
        if left <= 0:
            print(f"{what}: left out, the time is up", file=sys.stderr)
            return
        found = self.program.measure(function, self.task | task, what, limit=max(left, LONGEST_PROCESS))
        for row in found.get("rows", [{"form": what, **CASE, **found}]):
            self.rows.append(row)
            if "error" not in row:
                row |= self.compared(row)
        self.program.save()

    def compared(self, row: dict[str, Any]) -> dict[str, Any]:
        """How many tokens begin as in the first row, and the share of the reading rate that the base's weights take."""
        pairs = zip(row["ids"], self.rows[0].get("ids", []), strict=False)
        same = next((number for number, (ours, first) in enumerate(pairs) if ours != first), len(row["ids"]))
        size = row["base_parameters"] * (2 if row["precision"] == "bf16" else 4)
        steps = row["tokens_per_second"]["median"] / row["batch"]
        rate = size * steps / self.program.results["ceilings"]["read_bytes_per_second"]
        return {"same_tokens": same, "bytes_fraction": rate}


if __name__ == "__main__":
    sys.exit(run_program(main))
