"""What ends the plateau of the advanced model: `python -m benchmarks.signal` (`--help` tells the rest).

Its weights are drawn so small that a layer hands on about a third of what it reads. Variants of a configuration that
differ in this alone are trained, and what gets through their layers is measured after every epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.program import ROOT, Program, names, positive, run_program
from benchmarks.tables.benchmark import benchmark_tables
from newllm_jax.config import load_config
from newllm_jax.errors import InputError

VARIANTS: dict[str, dict[str, Any]] = {
    "normal": {"initialization": "normal", "cell": "plain"},
    "he": {"initialization": "he", "cell": "plain"},
    "he+residual": {"initialization": "he", "cell": "residual"},
    "residual": {"initialization": "normal", "cell": "residual"},
}
DEFAULT = "normal,he,he+residual"


def options() -> Program:
    """The program with its options; nothing is parsed or measured yet."""
    description = "Measure signal and gradient of every layer of New-LLM while it trains, by initialisation and cell."
    program = Program("signal", description, default_folder=ROOT / "docs" / "results" / "ablation")
    add = program.parser.add_argument
    add("--config", metavar="NAME", default="advanced", help="configuration, name or file (default %(default)s)")
    add("--variants", metavar="NAMES", default=DEFAULT, help=f"variants a,b of it (default %(default)s; there are: "
        f"{', '.join(VARIANTS)})")  # fmt: skip
    add("--dataset", help="data set: Hub name, folder, file or builtin (default: the configuration's)")
    add("--precision", default="auto", help="precision of training, as for train.py (default auto); the measures are "
        "strict float32")  # fmt: skip
    add("--epochs", type=positive, default=24, help="number of epochs to train (default %(default)s)")
    add("--texts", type=positive, default=128, help="number of validation texts to measure (default %(default)s)")
    return program


def main(argv: Sequence[str]) -> None:
    """Trains and measures the variants that the command line asks for, writes and prints what was found."""
    program = options().parse(argv)
    typed = program.arguments
    variants = names(typed.variants, list(VARIANTS), "variants")
    if not variants:
        raise InputError("variants: names no variant")
    overrides = {"dataset": typed.dataset} if typed.dataset else {}
    config = load_config(typed.config, overrides | {"precision": typed.precision})
    with program:
        program.start(typed.precision, ceilings=False)
        program.results |= {"config": typed.config, "settings": config.to_dict(), "texts": typed.texts, "variants": {}}
        for name in variants:
            task = {"config": config.override(VARIANTS[name]).to_dict(), "epochs": typed.epochs, "texts": typed.texts}
            found = program.measure("benchmarks.subjects.signal:measure", task, f"{typed.config}: {name}")
            program.results["variants"][name] = VARIANTS[name] | found
            program.save()
        program.write(benchmark_tables(program.results))


if __name__ == "__main__":
    sys.exit(run_program(main))
