"""The tables of `make_tables.py` that put several measurements side by side: speed, and what the fast path changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from newllm_jax.report.tables import markdown_table, number

Load = Callable[[str], Any]  # a path under docs/results -> its JSON


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


def unmoved(load: Load) -> str:
    """Final figures before and after the fast path."""
    rows = []
    for config, seeds in (("baseline", (0,)), ("advanced", (0, 1, 2))):
        before = [load(f"newllm/{config}-seed{seed}.json")["best"]["val_ppl"] for seed in (0, 1, 2)]
        after = [load(f"newllm/{config}-fused-bf16-seed{seed}.json")["best"]["val_ppl"] for seed in seeds]
        rows.append([f"`{config}`, best val PPL", "tf32", _each(before), "bf16", _each(after)])
    before, after = load("cascade/ratio06.json"), load("cascade/ratio06-single-token.json")
    for name, figure in (
        ("stage 1, best hard-token PPL", lambda run: run["stages"][0]["best"]["val_ppl"]),
        ("Base+1, val PPL", lambda run: run["ensemble"][1]["val_ppl"]),
        ("Base+5, val PPL", lambda run: run["ensemble"][-1]["val_ppl"]),
    ):
        rows.append([f"CASCADE 0.6, {name}", "tf32", number(figure(before)), "tf32", number(figure(after))])
    return markdown_table(["what", "in", "separate kernels", "in", "fast path"], rows)


def _each(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


SPEED_TABLES: dict[str, Callable[[Load], str]] = {
    "speed": speed,
    "speed loops": loops,
    "speed tilings": tilings,
    "speed unmoved": unmoved,
}
