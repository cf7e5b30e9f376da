"""Learning curves as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from newllm_jax.files import whole_file
from newllm_jax.report.tables import number


@contextmanager
def picture(path: Path, title: str) -> Iterator[Any]:
    """A PNG of two drawings side by side, whose axes it yields.

    In the style of matplotlib itself: a `matplotlibrc` of the current folder could have LaTeX run.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default"):
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        drawings = figure.subplots(1, 2)
        yield drawings
        for axes in drawings:
            axes.grid(alpha=0.3)
        figure.suptitle(title)
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=120, format="png")


def save_curves(
    path: Path, epochs: Sequence[dict[str, Any]], title: str, unit: str = "word", dropout: bool = True
) -> None:
    """Loss of both splits and validation perplexity by epoch, as a PNG."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    numbers = [entry["epoch"] for entry in epochs]
    marker = "o" if len(numbers) < 20 else None
    with picture(path, title) as (losses, perplexities):
        losses.plot(
            numbers,
            [entry["train_loss"] for entry in epochs],
            marker=marker,
            label="train (with dropout)" if dropout else "train",
        )
        losses.plot(numbers, [entry["val_loss"] for entry in epochs], marker=marker, label="validation")
        losses.set(xlabel="epoch", ylabel=f"loss (nats per {unit})")
        losses.legend()
        perplexities.plot(numbers, [entry["val_ppl"] for entry in epochs], marker=marker, color="tab:orange")
        perplexities.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
        for formatter in (perplexities.yaxis.set_major_formatter, perplexities.yaxis.set_minor_formatter):
            formatter(ScalarFormatter())
        for axes in (losses, perplexities):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def save_stage_curves(
    path: Path, stages: Sequence[dict[str, Any]], ensemble: Sequence[dict[str, Any]], title: str
) -> None:
    """Loss of each CASCADE stage by epoch, and the perplexity over all tokens by number of stages, as a PNG."""
    from matplotlib.ticker import MaxNLocator

    with picture(path, title) as (losses, perplexities):
        for place, stage in enumerate(stages):
            epochs, color = [entry["epoch"] for entry in stage["epochs"]], f"C{place}"
            label = f"stage {stage['stage']}"
            losses.plot(epochs, [entry["val_loss"] for entry in stage["epochs"]], "o-", color=color, label=label)
            losses.plot(epochs, [entry["train_loss"] for entry in stage["epochs"]], "o:", color=color)
        losses.set(xlabel="epoch", ylabel="loss on hard tokens (dotted: train)")
        losses.xaxis.set_major_locator(MaxNLocator(integer=True))
        losses.legend()
        names = ["Base", *(f"+{entry['stages']}" for entry in ensemble[1:])]
        bars = perplexities.bar(names, [entry["val_ppl"] for entry in ensemble])
        perplexities.bar_label(bars, [number(entry["val_ppl"]) for entry in ensemble])
        perplexities.set(ylabel="validation perplexity, all tokens", xlabel="stages")
