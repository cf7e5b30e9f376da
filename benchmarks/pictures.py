"""Pictures of the results of `python -m benchmarks.signal`: `python -m benchmarks.pictures [FILE.json ...]`.

Each lies beside its JSON file, under the same name; without a FILE all of docs/results/ablation are drawn, and the
frontier of docs/results/cascade.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.program import run_program
from benchmarks.tables.files import RESULTS
from benchmarks.tables.frontier import drawn_entries
from newllm_jax.cli.options import Parser
from newllm_jax.files import read_json, whole_file
from newllm_jax.report.frontier import save_frontier

ROWS = {"signal": "signal (RMS)", "gradient": "gradient (RMS)"}  # measures, and how they are called


def main(argv: Sequence[str]) -> None:
    """Draws what the command line names. Raises InputError."""
    parser = Parser(prog="python -m benchmarks.pictures", description=__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="file of `python -m benchmarks.signal`")
    files = parser.parse_all(argv).files
    if not files and (RESULTS / "cascade" / "frontier.json").exists():
        path = RESULTS / "cascade" / "frontier.png"
        save_frontier(path, {"entries": drawn_entries()})
        print(f"written to {path}")
    for file in files or sorted((RESULTS / "ablation").glob("signal-*.json")):
        path = file.with_suffix(".png")
        save_signal(path, read_json(file))
        print(f"written to {path}")


def save_signal(path: Path, results: dict[str, Any]) -> None:
    """Signal and gradient by epoch, a line a layer and a column a variant, and the variants' perplexities, as a PNG."""
    from matplotlib import colormaps, style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    variants = {name: found["epochs"] for name, found in results["variants"].items() if "error" not in found}
    layout: list[Any] = [[*(f"{measure} {name}" for name in variants), "perplexity"] for measure in ROWS]
    with style.context("default"):  # a `matplotlibrc` of the current folder has no say
        figure = Figure(figsize=(3.2 * len(variants) + 4, 6.5), layout="constrained")
        FigureCanvasAgg(figure)
        drawings = figure.subplot_mosaic(layout)
        for measure, title in ROWS.items():
            first = drawings[layout[0][0].replace("signal", measure, 1)]
            for name, epochs in variants.items():
                axes = drawings[f"{measure} {name}"]
                axes.sharey(first)
                layers = len(epochs[0][measure])
                for layer in range(layers):
                    color = colormaps["viridis"](layer / layers)
                    values = [entry[measure][layer] for entry in epochs]
                    axes.plot([entry["epoch"] for entry in epochs], values, color=color, label=f"layer {layer + 1}")
                axes.set(title=f"{name}: {title}", yscale="log", xlabel="epoch")
            first.legend(fontsize="xx-small", ncols=2)
        perplexity = drawings["perplexity"]
        for name, epochs in variants.items():
            trained = epochs[1:]  # before the first update it says nothing, and is far above the rest
            values = [math.nan if entry["val_ppl"] is None else entry["val_ppl"] for entry in trained]
            perplexity.plot([entry["epoch"] for entry in trained], values, label=name)
        perplexity.set(title="validation perplexity", yscale="log", xlabel="epoch")
        perplexity.legend()
        for axes in drawings.values():
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=90, format="png")


if __name__ == "__main__":
    sys.exit(run_program(main))
