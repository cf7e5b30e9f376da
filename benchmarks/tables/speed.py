"""The tables that put several measurements side by side: speed, kernels, and where training ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.tables.benchmark import BEST_LOSSES, best_loss_cells
from benchmarks.tables.files import load, load_all
from newllm_jax.report.tables import markdown_table

Rows = list[dict[str, Any]]
PEERS = ("eager", "CUDA graph")  # the ends of their names


def speed() -> str:
    """Epochs and the extraction beside PyTorch in the same precision; bf16, which PyTorch was not timed in, apart."""
    lines = []
    for config, name in (("advanced", "newllm-advanced-clusters-h200"), ("baseline", "newllm-baseline-h200")):
        measured = load(f"benchmarks/{name}.json")["configs"][config]["rows"]
        lines.append(speed_line(f"`{config}`, an epoch", measured, "epoch_seconds"))
    cascade = load("benchmarks/cascade-h200.json")
    stage, extraction = cascade["configs"]["stage 1"]["rows"], cascade["extraction"]["rows"]
    lines.append(speed_line("CASCADE stage 1 at 0.6, an epoch", stage, "epoch_seconds"))
    lines.append(speed_line("CASCADE, the base over 128,000 tokens", extraction, "full_seconds"))
    header = ["work", "precision of both", "newllm_jax", "PyTorch eager", "PyTorch CUDA graph", "newllm_jax in bf16",
              "bf16 against PyTorch in tf32: eager, graph"]  # fmt: skip
    return markdown_table(header, lines)


def speed_line(work: str, rows: Rows, key: str) -> list[str]:
    """Seconds in the precision of the peers, theirs with the factor, then bf16."""
    peers = [next((row for row in rows if row["name"].endswith(word) and "error" not in row), None) for word in PEERS]
    ours = {row.get("precision", "fp32"): row[key] for row in rows if row["name"] == "newllm_jax"}
    (precision,) = {peer.get("precision", "fp32") for peer in peers if peer}  # the extraction's rows name none: fp32
    cells = [work, precision, f"**{ours[precision]:.2f} s**"]
    cells += [f"{peer[key]:.2f} s ({peer[key] / ours[precision]:.1f}x)" if peer else "-" for peer in peers]
    if "bf16" not in ours:
        return [*cells, "-", "-"]
    factors = ", ".join(f"{peer[key] / ours['bf16']:.1f}x" if peer else "-" for peer in peers)
    return [*cells, f"{ours['bf16']:.2f} s", factors]


def kernels() -> str:
    """What an update is made of on the GPU, from the traces."""
    rows = []
    for name, traced in load_all("benchmarks", "profile-*.json").items():
        precision = traced.get("precision", traced["environment"]["precision"])
        busy, count = traced["busy_us_per_update"], traced["kernels_per_update"]
        rows.append([
            f"[{traced['what']}](benchmarks/{name}.json)", precision, f"{busy / 1e3:.2f}", f"{count:,.0f}",
            f"{busy / count:.1f}", f"{traced['idle_share']:.0%}", _longest(traced["kernels"]),
        ])  # fmt: skip
    header = ["an update of", "precision", "kernels busy, ms", "kernels", "a kernel, us", "idle while traced",
              "the three that take longest (launches x us)"]  # fmt: skip
    return markdown_table(header, rows)


def _longest(rows: Rows) -> str:
    return ", ".join(f"`{row['kernel'][:28]}` {row['per_update']:.0f} x {row['mean_us']:.1f}" for row in rows[:3])


def ends() -> str:
    """Where training of New-LLM ends by the form of its loops and the precision, over seeds."""
    runs = load("benchmarks/newllm-seeds-h200.json")["rows"]
    rows = []
    for config in ("baseline", "advanced"):
        separate = [load(f"newllm/{config}-loops-seed{seed}.json") for seed in range(3)]
        rows.append([f"`{config}`", "separate kernels", "tf32", *best_loss_cells(separate)])
        for precision in ("tf32", "bf16"):
            group = [run for run in runs if (run["config"], run["precision"]) == (config, precision)]
            rows.append([f"`{config}`", "one kernel each way", precision, *best_loss_cells(group)])
    return markdown_table(["config", "time loop", "precision", *BEST_LOSSES], rows)


SPEED_TABLES: dict[str, Callable[[], str]] = {"speed": speed, "speed kernels": kernels, "speed ends": ends}
