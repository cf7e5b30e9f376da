"""The table of `python -m benchmarks.clusters`: microseconds a phase by way of exchange."""

from __future__ import annotations

from typing import Any

from newllm_jax.report.tables import markdown_table


def phase_table(results: dict[str, Any]) -> str:
    """A line for each shape and way: microseconds a phase."""
    header = ["shape", "clusters of 8", "rows of each", "exchange by", "a phase, us (min to max)", "error"]
    return markdown_table(header, [
        [
            row["shape"], str(row["clusters"]), str(row["rows"]), row["exchange"],
            "{median:.2f} ({min:.2f} to {max:.2f})".format(
                **{name: 1e6 * row["phase_seconds"][name] for name in ("median", "min", "max")}
            ),
            f"{row['error']:.1e}" if "error" in row else "-",
        ]
        for row in results["rows"]
    ])  # fmt: skip
