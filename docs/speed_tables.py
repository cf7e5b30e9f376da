"""The tables of `make_tables.py` that put several measurements side by side: speed, and what the fast path changed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from newllm_jax.report.tables import markdown_table, number

Load = Callable[[str], Any]  # a path under docs/results -> its JSON
FAST = ("tf32", "bf16")


def speed(load: Load) -> str:
    """Epochs and the extraction beside PyTorch, each line from one run on one machine."""
    rows = []
    for config in ("advanced", "baseline"):
        measured = load(f"benchmarks/newllm-{config}-h200.json")["configs"][config]["rows"]
        ours = [row for row in measured if row["name"] == "newllm_jax"]
        rows.extend([f"`{config}`, an epoch", row["precision"], *_line(measured, row, "epoch_seconds")] for row in ours)
    cascade = load("benchmarks/cascade-h200.json")
    measured = cascade["configs"]["stage 1"]["rows"]
    rows.append(["CASCADE stage 1 at 0.6, an epoch", measured[0]["precision"],
                 *_line(measured, measured[0], "epoch_seconds")])  # fmt: skip
    measured = cascade["extraction"]["rows"]
    rows.append(["CASCADE, the base over 128,000 tokens", "fp32", *_line(measured, measured[0], "full_seconds")])
    header = ["work", "precision", "newllm_jax", "PyTorch eager", "PyTorch CUDA graph"]
    return markdown_table(header, rows)


def _line(rows: list[dict[str, Any]], ours: dict[str, Any], key: str) -> list[str]:
    """Our seconds, and those of the peers with their factor."""
    cells = [f"**{ours[key]:.2f} s**"]
    for word in ("eager", "CUDA graph"):
        peer = next((row for row in rows if row["name"].endswith(word) and "error" not in row), None)
        cells.append("-" if peer is None else f"{peer[key]:.2f} s ({peer[key] / ours[key]:.1f}x)")
    return cells


def loops(load: Load) -> str:
    """What an update is made of on the GPU, by the form of its loops."""
    rows = [
        [
            row["config"], row["form"], row["precision"], f"{row['update_ms']:.2f}", f"{row['busy_ms']:.2f}",
            f"{row['kernels_per_update']:,.0f}", f"{1e3 * row['busy_ms'] / row['kernels_per_update']:.1f}",
            _longest(row["kernels"]),
        ]
        for row in load("benchmarks/loops-h200.json")["rows"]
    ]  # fmt: skip
    header = ["config", "form", "precision", "an update, ms", "kernels busy, ms", "kernels", "a kernel, us",
              "the three that take longest (launches x us)"]  # fmt: skip
    return markdown_table(header, rows)


def _longest(kernels: list[list[Any]]) -> str:
    return ", ".join(f"`{name[:28]}` {count:.0f} x {mean:.1f}" for name, count, mean, _ in kernels[:3])


def tilings(load: Load) -> str:
    """Ways to cut the GPU kernels, timed alone."""
    cut = "rows, blocks, depth, warps, stages"
    rows = [
        [row["config"], row["precision"], row[cut], f"{row['forward_ms']:.2f}", f"{row['backward_ms']:.2f}"]
        for row in load("benchmarks/loops-h200.json")["tilings"]
    ]
    return markdown_table(["config", "precision", cut, "forward, ms", "backward, ms"], rows)


def ends(load: Load) -> str:
    """Where training of New-LLM ends by the form of its loops and the precision, over seeds."""
    runs = load("studies/precision-h200.json")["rows"]
    rows = []
    for config in ("baseline", "advanced"):
        separate = [load(f"newllm/{config}-loops-seed{seed}.json") for seed in range(3)]
        studied = {name: [run for run in runs if (run["config"], run["precision"]) == (config, name)] for name in FAST}
        for form, precision, group in (
            ("separate kernels", "tf32", separate),
            ("one kernel each way", "tf32", studied["tf32"]),
            ("one kernel each way", "bf16", studied["bf16"]),
        ):
            losses = [run["best"]["val_loss"] for run in group]
            spread = statistics.stdev(losses)
            low, high = (math.exp(edge(losses)) for edge in (min, max))
            rows.append([
                f"`{config}`", form, precision, str(len(group)),
                f"{statistics.mean(losses):.4f} +- {spread / math.sqrt(len(group)):.4f}", f"{spread:.4f}",
                f"{math.exp(statistics.mean(losses)):.2f}", f"{low:.2f} to {high:.2f}",
            ])  # fmt: skip
    header = ["config", "time loop", "precision", "seeds", "best val loss, mean +- its error", "spread of runs",
              "PPL of the mean", "lowest to highest PPL"]  # fmt: skip
    return markdown_table(header, rows)


def stages(load: Load) -> str:
    """CASCADE at 0.6 by the form of a stage's update and the seed."""
    rows = [
        [run["form"], str(run["seed"]), *(number(stage["best"]["val_ppl"]) for stage in run["stages"]),
         *(number(run["ensemble"][at]["val_ppl"]) for at in (0, 1, -1))]
        for run in load("studies/stages-h200.json")["rows"]
    ]  # fmt: skip
    return markdown_table(["update", "seed", *(f"stage {n}" for n in range(1, 6)), "Base", "Base+1", "Base+5"], rows)


def tried(load: Load) -> str:
    """Pairs of forms, timed side by side, and which was kept."""
    rows = [
        [row["what"], f"{row['first_ms']:.3f}", f"{row['second_ms']:.3f}", row["kept"]]
        for row in load("benchmarks/loops-h200.json")["tried"]
    ]
    return markdown_table(["one form / another", "first, ms", "second, ms", "kept"], rows)


def products(load: Load) -> str:
    """The rate of small products in a loop, without a GPU."""
    rows = [[what, *(f"{rate:.0f}" for rate in rates)] for what, *rates in load("benchmarks/products-cpu.json")["rows"]]
    return markdown_table(["products of 32 texts, 512 to 512, in a loop", "GFLOP/s, median", "best"], rows)


def forms(load: Load) -> str:
    """Times by the form of the time loop, without a GPU."""
    forms = load("benchmarks/products-cpu.json")["forms_ms"]
    rows = [[what, *(f"{milliseconds:,.0f}" for milliseconds in spans)] for what, *spans in forms]
    return markdown_table(["the baseline", "ms, median", "best"], rows)


SPEED_TABLES: dict[str, Callable[[Load], str]] = {
    "speed": speed,
    "speed loops": loops,
    "speed tilings": tilings,
    "speed tried": tried,
    "speed ends": ends,
    "speed stages": stages,
    "speed products": products,
    "speed forms": forms,
}
