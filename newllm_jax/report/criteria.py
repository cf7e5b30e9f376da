"""The table of `newllm hardness`: how well each criterion tells hard tokens."""

from __future__ import annotations

from typing import Any

from newllm_jax.report.tables import markdown_table, number

NOTES = {
    "cosine": "of embedding and last hidden state",
    "entropy": "of the prediction",
    "max_probability": "of the prediction",
    "margin": "of the prediction",
    "oracle": "the loss itself",
    "random": "by chance",
}


def criteria_table(results: dict[str, Any]) -> str:
    """One line a criterion; a dash where there is no gain, no token or no cost."""
    share = results["hard_ratio"]
    header = ["criterion", "rank correlation with the loss", "with the gain", f"PPL of the hard {share:.0%}",
              "of the others", "cost, passes of the base", ""]  # fmt: skip
    return markdown_table(header, [
        [
            row["criterion"], _signed(row["loss_correlation"]), _signed(row["gain_correlation"]),
            number(row["hard_ppl"]), number(row["easy_ppl"]), number(row["cost"], 4), _note(row, results),
        ]
        for row in results["criteria"]
    ])  # fmt: skip


def criteria_text(results: dict[str, Any]) -> str:
    """The table, and what its numbers are of."""
    base, data = results["base"], results["data"]
    lines = [
        criteria_table(results),
        "",
        f"Over {data['val_tokens']:,} validation tokens, on which the base has PPL {number(base['val_ppl'])}. Hardness "
        "is the negated score; its cost is what it adds to the layers of the base.",
    ]
    if run := results["run"]:
        lines.append(
            f"The gain is the loss of the easy path less that of the hard path of {run['name']}: "
            f"{run['mean_gain']:+.4f} nats on average."
        )
    return "\n".join(lines)


def _note(row: dict[str, Any], results: dict[str, Any]) -> str:
    if row["target"] is None:
        return NOTES[row["criterion"]]
    return f"trained to predict the {row['target']}, on {results['data']['train_chunks']:,} chunks"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
