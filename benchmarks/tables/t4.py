"""What training would take on a Tesla T4: an estimate from programs compiled for one, beside the published times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness.t4 import Bounds
from benchmarks.harness.work import newllm_update, stage_update
from benchmarks.tables.files import load
from newllm_jax.config import load_config
from newllm_jax.report.tables import markdown_table
from newllm_jax.smollm.llama_config import LlamaConfig

PUBLISHED = {"advanced": "36 to 42 s"}  # an epoch on a T4: the report of New-LLM
PUBLISHED_STAGES = "852.7 s"  # the training of all stages: the report of CASCADE
UPDATES = {"advanced": 100, "baseline": 1595}  # of an epoch on WikiText-2


def estimates(rows: Sequence[dict[str, Any]]) -> str:
    """An epoch of New-LLM in each row's precision: what bounds an update, and seconds an epoch."""
    lines = []
    for row in rows:
        config, updates = load_config(row["config"]), UPDATES.get(row["config"])
        flops = newllm_update(config, row["vocabulary"]).flops
        bounds = Bounds.of(row["precision"], flops, row["bytes"], row["kernels"])
        epoch = f"**{updates * bounds.least:.0f} to {updates * bounds.total:.0f} s**" if updates else "-"
        lines.append([
            f"`{row['config']}`", row["precision"], f"{flops / 1e9:,.0f}", f"{row['bytes'] / 1e9:.1f}",
            f"{row['kernels']:,}", *(f"{1e3 * each:.0f}" for each in (bounds.products, bounds.memory, bounds.launches)),
            f"{row['planned_memory_bytes'] / 2**30:.2f}", epoch, PUBLISHED.get(row["config"], "-"),
        ])  # fmt: skip
    header = ["config", "precision", "GFLOP an update", "GB", "kernels", "products, ms", "memory, ms", "kernels, ms",
              "memory needed, GiB", "an epoch, estimate", "published"]  # fmt: skip
    return markdown_table(header, lines)


def stages() -> str:
    """The stages of CASCADE at hard ratio 0.6, from the bytes and operations that an update needs at least."""
    run = load("cascade/ratio06.json")
    batch = run["config"]["batch_size"]
    work = stage_update(LlamaConfig(num_layers=run["config"]["stage_layers"]), batch)
    updates = sum(-(-stage["train_tokens"] // batch) * len(stage["epochs"]) for stage in run["stages"])
    bounds = Bounds.of("fp32", work.flops, work.bytes, 0)
    header = ["updates of all stages", "GFLOP an update", "GB", "all updates, estimate", "published"]
    return markdown_table(header, [[
        f"{updates:,}", f"{work.flops / 1e9:.0f}", f"{work.bytes / 1e9:.1f}",
        f"**{updates * bounds.least:.0f} to {updates * bounds.total:.0f} s**", PUBLISHED_STAGES,
    ]])  # fmt: skip


T4_TABLES: dict[str, Callable[[], str]] = {
    "t4": lambda: estimates(load("benchmarks/t4.json")["rows"]),
    "t4 stages": stages,
}
