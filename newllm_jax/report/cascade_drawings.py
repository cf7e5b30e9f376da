"""CASCADE drawn: stages by epoch, the perplexity over all tokens, where they exit, what they lose, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from newllm_jax.report.cascade_tables import configuration_name
from newllm_jax.report.curves import label, logarithmic, series, stage_drawings, tell
from newllm_jax.report.plots import INK, MUTED, PAPER, Axes, Drawing, color, legend_below, place_color
from newllm_jax.report.tables import number


def cascade_drawings(results: Mapping[str, Any]) -> list[Drawing]:
    """The drawings of a run's report."""
    ensemble = results["ensemble"]
    drawings = [
        Drawing("Perplexity over all tokens", lambda axes: draw_ensembles(axes, [{"name": "", "ensemble": ensemble}])),
        Drawing("Where tokens exit", lambda axes: draw_exit_rates(axes, ensemble)),
        Drawing("Loss at each exit (nats)", lambda axes: draw_exit_groups(axes, ensemble[-1])),
    ]
    if all("flops" in entry for entry in ensemble):
        drawings.append(Drawing("Perplexity over the cost of a token", lambda axes: draw_frontier(axes, ensemble)))
    return [*drawings, *stage_drawings(results["stages"])]


def compared_ensembles(runs: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """The perplexity over all tokens by the number of stages, a colour a run."""
    shown = [run for run in runs if "ensemble" in run]
    if not shown:
        return []
    return [Drawing("Perplexity over all tokens, by stages", lambda axes: draw_ensembles(axes, shown))]


def draw_ensembles(axes: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
    """The perplexity over all tokens by the number of stages; a line for the base where there is one run only."""
    most = max(len(run["ensemble"]) for run in runs)
    for place, run in enumerate(runs):
        found = series(run["ensemble"], "val_ppl")
        axes.plot(range(len(found)), found, marker="o", color=color(place), label=label(run["name"]) or "_")
        if len(runs) == 1:
            for stages, entry in enumerate(run["ensemble"]):
                falls = stages and found[stages] < found[stages - 1]
                # Beside the line of the base, and on the side of a point where no curve comes from.
                apart, side = ((0, -14 if falls else 7), "center") if stages else ((-6, 5), "right")
                tell(axes, number(entry["val_ppl"]), (stages, found[stages]), apart, side)
            axes.axhline(found[0], color=MUTED, linewidth=0.8, linestyle="--")
    axes.set_xticks(range(most), [configuration_name(stages) for stages in range(most)])
    axes.margins(x=0.12)
    logarithmic(axes, [entry["val_ppl"] for run in runs for entry in run["ensemble"]], 0.18)
    if len(runs) > 1:
        axes.legend()


def draw_exit_rates(axes: Axes, ensemble: Sequence[Mapping[str, Any]]) -> None:
    """A bar for each ensemble, divided by the places where its tokens exit."""
    names = [configuration_name(entry["stages"]) for entry in ensemble]
    for place in range(len(ensemble[-1]["exit_rates"])):
        rates = [entry["exit_rates"][place] if place < len(entry["exit_rates"]) else 0 for entry in ensemble]
        left = [sum(entry["exit_rates"][:place]) for entry in ensemble]
        bars = axes.barh(names, rates, 0.62, left, color=place_color(place), label=place_name(place))
        texts = axes.bar_label(bars, [f"{rate:.0%}" if rate > 0.09 else "" for rate in rates], label_type="center")
        for text in texts:
            text.set(color=PAPER, fontsize=9, fontweight="bold")
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    legend_below(axes, 3)


def draw_exit_groups(axes: Axes, entry: Mapping[str, Any]) -> None:
    """For the tokens of each exit, a line from the loss that the base has on them to the one that they exit with."""
    for place, group in enumerate(entry["exit_groups"]):
        if None in (group["base_loss"], group["loss"]):
            continue
        tone = place_color(group["exit"])
        axes.plot([group["base_loss"], group["loss"]], [place, place], color=tone, linewidth=2.5, alpha=0.6)
        axes.plot(group["base_loss"], place, "|", color=INK, markersize=16, markeredgewidth=2)
        axes.plot(group["loss"], place, "o", color=tone, markersize=8)
    axes.plot([], [], "|", color=INK, markersize=10, markeredgewidth=2, label="the base on these tokens")
    axes.plot([], [], "o", color=MUTED, markersize=7, label="where they exit")
    axes.set_yticks(range(len(entry["exit_groups"])), [place_name(group["exit"]) for group in entry["exit_groups"]])
    axes.set_ylim(len(entry["exit_groups"]) - 0.5, -0.5)
    legend_below(axes, 2)


def draw_frontier(axes: Axes, ensemble: Sequence[Mapping[str, Any]]) -> None:
    """The perplexity of each ensemble over what a token costs in it."""
    costs, found = [entry["flops"] for entry in ensemble], series(ensemble, "val_ppl")
    axes.plot(costs, found, color=MUTED, linewidth=0.9, linestyle=":")
    for entry, cost, ppl in zip(ensemble, costs, found, strict=True):
        axes.plot(cost, ppl, "o", color=place_color(entry["stages"]), markersize=7)
        tell(axes, configuration_name(entry["stages"]), (cost, ppl), (0, 9))
    axes.set_xlabel("cost, in passes of the base")
    axes.margins(x=0.18)
    logarithmic(axes, found, 0.2)


def place_name(place: int) -> str:
    """`base`, `stage 1`, ..."""
    return "base" if place == 0 else f"stage {place}"
