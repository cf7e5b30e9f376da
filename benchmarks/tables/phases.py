"""The tables of microseconds a phase of New-LLM's time loop: of its kernels, and in thread-block clusters."""

from __future__ import annotations

from typing import Any

from newllm_jax.report.tables import markdown_table


def phase_table(results: dict[str, Any]) -> str:
    """`python -m benchmarks.newllm --sweep phases`: the kernels with their waits and without, and the peer."""
    header = ["config", "precision", "what", "waits of thread blocks", "phases", "all of them, ms", "a phase, us"]
    return markdown_table(header, [
        [
            config, row["precision"], row["name"], row["waits"], f"{row['phases']:,}",
            f"{row['seconds']['median'] * 1e3:.3f}",
            _microseconds({name: row["seconds"][name] / row["phases"] for name in ("median", "min", "max")}),
        ]
        for config, entry in results["configs"].items() for row in entry["rows"]
    ])  # fmt: skip


def cluster_table(results: dict[str, Any]) -> str:
    """`python -m benchmarks.clusters`: a line for each shape and way of exchange."""
    header = ["shape", "clusters of 8", "rows of each", "exchange by", "a phase, us (min to max)", "error"]
    return markdown_table(header, [
        [
            row["shape"], str(row["clusters"]), str(row["rows"]), row["exchange"], _microseconds(row["phase_seconds"]),
            f"{row['error']:.1e}" if "error" in row else "-",
        ]
        for row in results["rows"]
    ])  # fmt: skip


def _microseconds(seconds: dict[str, float]) -> str:
    return "{median:.2f} ({min:.2f} to {max:.2f})".format(
        **{name: 1e6 * seconds[name] for name in ("median", "min", "max")}
    )
