"""The frontier of quality against compute: its table and its plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from newllm_jax.report.plots import picture
from newllm_jax.report.tables import markdown_table, number

NAMED_POLICIES = {"oracle": "oracle (knows the loss of both paths)", "random": "chance"}
WORST = 1000  # times the perplexity of the base: what is worse than that is not drawn


def frontier_table(content: dict[str, Any]) -> str:
    """One line a model: its perplexity at the threshold of its run, what it costs, and what it loses on other texts."""
    others = sorted({name for entry in content["entries"] for name in entry.get("elsewhere", {})})
    header = ["model", "trained parameters", "cost of a token", "test PPL", "loss (95 % interval)",
              *(f"loss on {Path(name).name}" for name in others), "tokens/s, 1 text", "32 texts"]  # fmt: skip
    rows = []
    for entry in content["entries"]:
        if entry["policy"] in NAMED_POLICIES:
            continue
        chosen = entry.get("chosen", entry["points"][0])
        elsewhere = entry.get("elsewhere", {})
        rows.append([
            entry["name"], f"{entry['trained_parameters']:,}", f"{chosen['flops']:.3f}", number(chosen["ppl"]),
            f"{chosen['loss']:.4f} ({chosen['low']:.3f} to {chosen['high']:.3f})",
            *(f"{elsewhere[name]['loss']:.4f}" if name in elsewhere else "-" for name in others),
            *(f"{chosen['speed'][batch]['tokens_per_second']:,.0f}" if "speed" in chosen else "-"
              for batch in ("1", "32")),
        ])  # fmt: skip
    return markdown_table(header, rows)


def curve_table(content: dict[str, Any]) -> str:
    """One line a curve: the perplexity at each share of hard tokens, over what a token costs there."""
    curves = [entry for entry in content["entries"] if len(entry["points"]) > 1]
    header = ["model", "hard tokens chosen by", "cost: test PPL at 0, 10, ... 100 % hard tokens"]
    return markdown_table(header, [
        [
            entry["name"], NAMED_POLICIES.get(entry["policy"]) or entry["config"]["criterion"],
            ", ".join(f"{each['flops']:.2f}: {number(each['ppl'])}" for each in entry["points"]),
        ]
        for entry in curves
    ])  # fmt: skip


def frontier_page(content: dict[str, Any]) -> str:
    """The page of a frontier."""
    base = content["entries"][0]
    return f"""# Quality against compute

![perplexity over the cost of a token](frontier.png)

A cost of 1 is a pass of the base for every token, its head included; probes are counted. Thresholds were set on other
tokens. Test: {base["data"]["test_chunks"]:,} chunks of {base["data"]["source"]}; base: {base["source"]["source"]}.

{frontier_table(content)}

{curve_table(content)}

`{content["command"]}`
"""


def save_frontier(path: Path, content: dict[str, Any]) -> None:
    """The plot: curves of models that choose a path for each token, points of the others; right, near the base."""
    from matplotlib import colormaps

    base = content["entries"][0]["points"][0]["ppl"]
    worst = WORST * base
    with picture(path, f"Test perplexity over the cost of a token ({content['entries'][0]['data']['source']})") as both:
        for axes in both:
            axes.set_prop_cycle(color=colormaps["tab20"].resampled(20)(range(20)))
            for entry in content["entries"]:
                costs = [each["flops"] for each in entry["points"]]
                values = [each["ppl"] if each["ppl"] <= worst else math.nan for each in entry["points"]]
                if len(costs) == 1:
                    axes.plot(costs, values, "o", label=entry["name"])
                elif entry["policy"] in NAMED_POLICIES:
                    axes.plot(costs, values, ":" if entry["policy"] == "oracle" else "--", color="0.6", linewidth=0.8)
                else:
                    axes.plot(costs, values, marker=".", label=entry["name"])
            axes.axhline(base, color="0.3", linewidth=0.6)
            axes.set(xlabel="cost, in passes of the base", ylabel="test perplexity", yscale="log")
        both[1].set(xlim=(0.6, 1.8), ylim=(0.6 * base, 1.4 * base), yscale="linear")
        both[0].legend(fontsize="xx-small")
