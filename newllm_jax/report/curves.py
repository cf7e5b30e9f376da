"""The learning curves of a training, of several beside each other, and of the stages of CASCADE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from newllm_jax.report.plots import INK, MUTED, Axes, Drawing, color
from newllm_jax.report.published import Curve
from newllm_jax.report.tables import number

Entries = Sequence[Mapping[str, Any]]  # of epochs, as `results.json` has them
FEW = 20  # epochs that have a mark each
LARGEST = 1e30  # figure that is drawn; the margins of an axis with more than that overflow
LONGEST_LABEL = 34  # letters; a longer one would hide the curves


def training_drawings(
    epochs: Entries, unit: str = "word", dropout: bool = True, published: Curve | None = None
) -> list[Drawing]:
    """Loss, perplexity, accuracy, learning rate and gradient norm by epoch, the best epoch marked.

    Args:
      unit: what a loss is of.
      dropout: whether the training loss was measured with dropout.
      published: a curve that the run's settings are those of.
    """
    best = min(range(len(epochs)), key=lambda index: epochs[index]["val_loss"])

    def losses(axes: Axes) -> None:
        line(axes, epochs, "train_loss", 1, "training, with dropout" if dropout else "training")
        line(axes, epochs, "val_loss", 0, "validation")
        mark(axes, epochs[best], "val_loss", 0)
        axes.legend()

    def perplexities(axes: Axes) -> None:
        line(axes, epochs, "val_ppl", 0, "this run")
        mark(axes, epochs[best], "val_ppl", 0, number(epochs[best]["val_ppl"]))
        draw_published(axes, [published] if published else [])
        logarithmic(axes, [entry["val_ppl"] for entry in epochs])
        if published:
            axes.legend()

    def accuracies(axes: Axes) -> None:
        line(axes, epochs, "val_accuracy", 0, "validation")
        mark(axes, epochs[best], "val_accuracy", 0)
        axes.yaxis.set_major_formatter(percent)

    note = "" if published is None else f"Dashed, beside the perplexity: {published.told}."
    return [
        Drawing(f"Loss (nats per {unit})", losses),
        Drawing("Validation perplexity", perplexities, note),
        Drawing("Validation accuracy", accuracies),
        *rate_drawings(epochs),
    ]


def rate_drawings(epochs: Entries) -> list[Drawing]:
    """The learning rate, and the gradient norm with the bound that it is clipped at."""

    def rates(axes: Axes) -> None:
        line(axes, epochs, "learning_rate", 0, "")
        most = max(entry["learning_rate"] for entry in epochs)
        if most > 0:
            axes.set_ylim(0, 1.1 * most)
        power = math.floor(math.log10(most)) if 0 < most < 1e-2 else 0
        axes.yaxis.set_major_formatter(
            lambda value, _: f"{value / 10.0**power:.3g}" + (f"e{power}" if power and value else "")
        )

    def norms(axes: Axes) -> None:
        line(axes, epochs, "grad_norm", 0, "mean norm before clipping")
        bounds = series(epochs, "clip_norm")
        if not all(map(math.isnan, bounds)):
            axes.plot(numbers(epochs), bounds, ":", color=INK, drawstyle="steps-mid", label="bound of clipping")
        logarithmic(axes, [*series(epochs, "grad_norm"), *bounds])
        axes.legend()

    return [Drawing("Learning rate at the start of an epoch", rates), Drawing("Gradient norm", norms)]


def compared_drawings(runs: Iterable[Mapping[str, Any]], published: Sequence[Curve]) -> list[Drawing]:
    """Validation perplexity and loss of several runs on one axis each, a colour a run."""
    shown = [run for run in runs if run.get("epochs")]

    def drawn(axes: Axes, key: str) -> None:
        for place, run in enumerate(shown):
            line(axes, run["epochs"], key, place, label(run["name"]))
        if key == "val_ppl":
            draw_published(axes, published)
            logarithmic(axes, [entry[key] for run in shown for entry in run["epochs"]])
        axes.legend()

    note = " ".join(f"Dashed, beside the perplexity: {curve.told}." for curve in published)
    return [
        Drawing("Validation perplexity", lambda axes: drawn(axes, "val_ppl"), note),
        Drawing("Validation loss (nats)", lambda axes: drawn(axes, "val_loss")),
    ] if shown else []  # fmt: skip


def stage_drawings(stages: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """Loss, accuracy and gradient norm of each stage by epoch, the best epoch marked."""

    def drawn(axes: Axes, key: str, *dotted: str) -> None:
        for place, stage in enumerate(stages):
            epochs = stage["epochs"]
            for other in dotted:
                axes.plot(numbers(epochs), series(epochs, other), ":", marker=".", color=color(place))
            line(axes, epochs, key, place, f"stage {stage['stage']}")
            mark(axes, epochs[stage["best"]["epoch"] - 1], key, place)
        if key == "val_accuracy":
            axes.yaxis.set_major_formatter(percent)
        if len(stages) > 1:
            axes.legend()

    return [
        Drawing("Loss by epoch (nats; dotted: training)", lambda axes: drawn(axes, "val_loss", "train_loss")),
        Drawing("Validation accuracy by epoch", lambda axes: drawn(axes, "val_accuracy")),
        Drawing("Gradient norm by epoch", lambda axes: drawn(axes, "grad_norm")),
    ]


def numbers(epochs: Entries) -> list[int]:
    """Their numbers."""
    return [entry["epoch"] for entry in epochs]


def series(epochs: Entries, key: str) -> list[float]:
    """A figure of each epoch; NaN, which leaves a gap, where it has none or one that no axis holds."""
    figures = (math.inf if entry.get(key) is None else float(entry[key]) for entry in epochs)
    return [figure if abs(figure) < LARGEST else math.nan for figure in figures]


def line(axes: Axes, epochs: Entries, key: str, place: int, name: str) -> None:
    """Draws a figure by epoch."""
    from matplotlib.ticker import MaxNLocator

    marker = "o" if len(epochs) < FEW else None
    axes.plot(numbers(epochs), series(epochs, key), marker=marker, color=color(place), label=name or "_")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def mark(axes: Axes, entry: Mapping[str, Any], key: str, place: int, told: str = "") -> None:
    """Draws a ring around the best epoch, with a text above it."""
    value = series([entry], key)[0]
    axes.plot([entry["epoch"]], [value], "o", markersize=9, markerfacecolor="none", color=color(place), label="_")
    if told:
        tell(axes, f"best {told}", (entry["epoch"], value), (0, 10), "right" if entry["epoch"] > 1 else "left")


def tell(
    axes: Axes, text: str, point: tuple[float, float], apart: tuple[float, float], side: str = "center"
) -> None:  # fmt: skip
    """Writes a text beside a point, some units apart from it; none beside a gap."""
    if math.isfinite(point[1]):
        axes.annotate(text, point, apart, textcoords="offset points", ha=side)


def draw_published(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draws the points of published curves, joined by dashes."""
    for curve in curves:
        axes.plot([*curve.ppl], [*curve.ppl.values()], "--", color=MUTED, marker=".", label=f"published, {curve.name}")


def percent(value: float, _: object = None) -> str:
    """A share as a percentage, with the digits that tell ticks apart."""
    return f"{100 * value:.4g}%"


def logarithmic(axes: Axes, values: Iterable[float | None], margin: float = 0.06) -> None:
    """Makes the y axis logarithmic, where there is anything to draw, with few ticks, which are written as numbers.

    Args:
      values: what is drawn.
      margin: beside them, as a part of their range.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    found = [value for value in values if value and 1 / LARGEST < value < LARGEST]
    if not found:
        return
    low, high = math.log(min(found)), math.log(max(found))
    free = margin * (high - low) or 0.1
    axes.set_ylim(math.exp(low - free), math.exp(high + free))  # matplotlib's own margins can overflow
    axes.set_yscale("log")
    is_wide = high - low > math.log(8)
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5), numticks=12) if is_wide else MaxNLocator(6, steps=[1, 2, 5, 10])
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.3g}")


def label(name: str) -> str:
    """A name in a legend, which leaves out those that begin with an underscore."""
    short = name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"
    return f"\u200b{short}" if short.startswith("_") else short
