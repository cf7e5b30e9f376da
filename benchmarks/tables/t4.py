"""What training would take on a Tesla T4: an estimate from counted work and from kernels counted in a trace.

Three times bound an update: that of its matrix products, that of its bytes through memory, and that of starting its
kernels one after the other. It takes at least the longest of them, and about their sum where they do not overlap. The
same model of the card on which the kernels were counted is beside what was measured there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.work import Work, newllm_plain_update, stage_update
from benchmarks.tables.files import load
from newllm_jax.config import load_config
from newllm_jax.report.tables import markdown_table
from newllm_jax.smollm.llama_config import LlamaConfig

PUBLISHED = {"advanced": "36 to 42 s", "baseline": "-"}  # an epoch on a T4: the report of New-LLM
PUBLISHED_CASCADE = "852.7 s"  # the training of all stages: the report of CASCADE


@dataclass(frozen=True)
class Card:
    """What a card can do, in operations and bytes a second, and the seconds from one kernel to the next, at least."""

    flops: float
    bytes: float
    kernel: float

    def times(self, work: Work, kernels: float) -> tuple[float, float]:
        """Seconds of some work: at least, and with nothing overlapping."""
        parts = work.flops / self.flops, work.bytes / self.bytes, kernels * self.kernel
        return max(parts), sum(parts)


KERNEL = 5e-6  # from Python-free loops of a driver on a slow host; a CUDA graph would halve it
T4 = {"fp16": Card(65e12, 320e9, KERNEL), "fp32": Card(8.1e12, 320e9, KERNEL)}  # NVIDIA's data sheet


def estimates() -> str:
    """An epoch of New-LLM in both precisions that a T4 has, and the stages of CASCADE, beside the published times."""
    rows = []
    for name in ("advanced", "baseline"):
        profile, config = load(f"benchmarks/profile-{name}-fp16-h200.json"), load_config(name)
        updates = load(f"benchmarks/newllm-{name}-h200.json")["configs"][name]["updates_per_epoch"]
        kernels = profile["kernels_per_update"]
        for precision, card in T4.items():
            work = newllm_plain_update(config, config.vocabulary_size or 0, 2 if precision == "fp16" else 4)
            least, most = (updates * seconds for seconds in card.times(work, kernels))
            rows.append([
                f"`{name}`, an epoch", precision, f"{updates:,}", *_counted(work), f"{kernels:,.0f}",
                f"**{least:.0f} to {most:.0f} s**", PUBLISHED[name],
            ])  # fmt: skip
    stages = load("cascade/ratio06.json")
    batch = stages["config"]["batch_size"]
    work = stage_update(LlamaConfig(num_layers=stages["config"]["stage_layers"]), batch)
    updates = sum(-(-stage["train_tokens"] // batch) * len(stage["epochs"]) for stage in stages["stages"])
    least, most = (updates * seconds for seconds in T4["fp32"].times(work, 0))
    rows.append(["CASCADE at 0.6, all stages", "fp32", f"{updates:,}", *_counted(work), "not counted",
                 f"**{least:.0f} to {most:.0f} s**", PUBLISHED_CASCADE])  # fmt: skip
    header = ["work", "precision", "updates", "TFLOP an update", "GB an update", "kernels an update", "estimate",
              "published"]  # fmt: skip
    return markdown_table(header, rows)


def check() -> str:
    """The same model of the card of the trace, beside the time that its kernels took there."""
    rows = []
    for name in ("advanced", "baseline"):
        profile, config = load(f"benchmarks/profile-{name}-fp16-h200.json"), load_config(name)
        ceilings = load(f"benchmarks/newllm-{name}-h200.json")["ceilings"]
        often = [row["mean_us"] for row in profile["kernels"] if row["per_step"] >= 1]
        card = Card(ceilings["flops_per_second"]["bf16"], ceilings["bytes_per_second"], 1e-6 * min(often))
        times = card.times(newllm_plain_update(config, config.vocabulary_size or 0, 2), profile["kernels_per_update"])
        least, most = (f"{1e3 * seconds:.1f}" for seconds in times)
        rows.append([f"`{name}`", f"{least} to {most}", f"{profile['busy_us_per_update'] / 1e3:.1f}"])
    return markdown_table(["an update in fp16 on the H200", "this model, ms", "kernels busy, ms"], rows)


def _counted(work: Work) -> list[str]:
    return [f"{work.flops / 1e12:.3f}", f"{work.bytes / 1e9:.2f}"]


T4_TABLES: dict[str, Callable[[], Any]] = {"t4": estimates, "t4 check": check}
