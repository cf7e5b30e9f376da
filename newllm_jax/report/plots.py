"""Learning curves as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from newllm_jax.sources.cache import whole_file


def save_curves(path: Path, epochs: Sequence[dict[str, Any]], title: str) -> None:
    """Loss of both splits and validation perplexity by epoch, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, perplexities = figure.subplots(1, 2)
    numbers = [entry["epoch"] for entry in epochs]
    marker = "o" if len(numbers) < 20 else None
    losses.plot(numbers, [entry["train_loss"] for entry in epochs], marker=marker, label="train (with dropout)")
    losses.plot(numbers, [entry["val_loss"] for entry in epochs], marker=marker, label="validation")
    losses.set(xlabel="epoch", ylabel="loss (nats per word)")
    losses.legend()
    perplexities.plot(numbers, [entry["val_ppl"] for entry in epochs], marker=marker, color="tab:orange")
    perplexities.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    for formatter in (perplexities.yaxis.set_major_formatter, perplexities.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    for axes in (losses, perplexities):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
