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

    def perplexities(stem: str, seeds: int) -> str:
        runs = [load(f"newllm/{stem}-seed{seed}.json") for seed in range(seeds)]
        return " / ".join(f"{run['best']['val_ppl']:.2f}" for run in runs)

    rows = [
        ["`baseline`, best val PPL", perplexities("baseline", 3), perplexities("baseline-fused-tf32", 1), "-",
         perplexities("baseline-fused-bf16-first", 1)],
        ["`advanced`, best val PPL", perplexities("advanced", 3), perplexities("advanced-fused-tf32", 2),
         perplexities("advanced-fused-bf16", 3), perplexities("advanced-fused-bf16-first", 3)],
    ]  # fmt: skip
    before = [load(f"cascade/{stem}.json") for stem in ("ratio06", "ratio06-single-token")]
    after = load("cascade/ratio06-fused.json")
    figures: list[tuple[str, Callable[[Any], float]]] = [
        (f"stage {number}, best hard-token PPL", lambda run, at=number - 1: run["stages"][at]["best"]["val_ppl"])
        for number in range(1, 6)
    ]
    figures.append(("Base+1, val PPL", lambda run: run["ensemble"][1]["val_ppl"]))
    figures.append(("Base+5, val PPL", lambda run: run["ensemble"][-1]["val_ppl"]))
    for name, figure in figures:
        rows.append(
            [f"CASCADE 0.6, {name}", " / ".join(map(number, map(figure, before))), number(figure(after)), "-", "-"]
        )
    header = ["what", "before, tf32", "fast path, tf32", "fast path, bf16", "its first version, bf16"]
    return markdown_table(header, rows)


def tried(load: Load) -> str:
    """Pairs of forms, timed side by side, and which was kept."""
    rows = [
        [row["what"], f"{row['first_ms']:.3f}", f"{row['second_ms']:.3f}", row["kept"]]
        for row in load("benchmarks/loops-h200.json")["tried"]
    ]
    return markdown_table(["one form / another", "first, ms", "second, ms", "kept"], rows)


def products(load: Load) -> str:
    """The rate of small products in a loop, without a GPU."""
    rows = [[what, f"{rate:.0f}"] for what, rate in load("benchmarks/products-cpu.json")["rows"]]
    return markdown_table(["63 x 6 products of 32 x 512 by 512 x 512, one after the other", "GFLOP/s"], rows)


SPEED_TABLES: dict[str, Callable[[Load], str]] = {
    "speed": speed,
    "speed loops": loops,
    "speed tilings": tilings,
    "speed tried": tried,
    "speed unmoved": unmoved,
    "speed products": products,
}
