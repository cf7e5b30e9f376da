"""The tables of microseconds a phase of New-LLM's time loop: of its kernels, and in thread-block clusters."""

from __future__ import annotations

from typing import Any

from newllm_jax.report.tables import markdown_table


def phase_table(results: dict[str, Any]) -> str:
    """`python -m benchmarks.newllm --sweep phases`: both passes as they are and without waits, and the peer."""
    header = ["config", "precision", "pass", "phases", "all, ms (min to max)", "without waits, ms",
              "all by phases, us", "waits by phases, us"]  # fmt: skip
    rows = []
    for config, entry in results["configs"].items():
        for row in entry["rows"]:
            phases, seconds, without = row["phases"], row["seconds"], row.get("seconds_without_waits")
            rows.append([
                config, row["precision"], row["name"], f"{phases:,}", _span(seconds, 1e3, 3),
                _span(without, 1e3, 3) if without else "-", f"{1e6 * seconds['median'] / phases:.2f}",
                f"{1e6 * (seconds['median'] - without['median']) / phases:.2f}" if without else "-",
            ])  # fmt: skip
    return markdown_table(header, rows)


def cluster_table(results: dict[str, Any]) -> str:
    """`python -m benchmarks.clusters`: a line for each shape and way of exchange."""
    header = ["shape", "clusters of 8", "rows of each", "exchange by", "a phase, us (min to max)", "error"]
    return markdown_table(header, [
        [
            row["shape"], str(row["clusters"]), str(row["rows"]), row["exchange"], _span(row["phase_seconds"], 1e6, 2),
            f"{row['error']:.1e}" if "error" in row else "-",
        ]
        for row in results["rows"]
    ])  # fmt: skip


def _span(seconds: dict[str, float], unit: float, digits: int) -> str:
    median, least, most = (f"{unit * seconds[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"
