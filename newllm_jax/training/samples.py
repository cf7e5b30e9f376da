"""Texts that a model makes with the parameters of a first, a middle and the last epoch, for its report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from newllm_jax.errors import InputError, Note
from newllm_jax.training.checkpoint import Checkpoints
from newllm_jax.training.step import Params


def sampled_epochs(epochs: Sequence[int]) -> list[int]:
    """Of the epochs that have a checkpoint, rising: the first, the one nearest to the middle, the last."""
    if not epochs:
        return []
    middle = (epochs[0] + epochs[-1]) / 2
    return sorted({epochs[0], min(epochs, key=lambda epoch: abs(epoch - middle)), epochs[-1]})


def epoch_samples(
    checkpoints: Checkpoints, like: Params, prompt: str, pieces: Callable[[Params], Iterator[str]], separator: str = ""
) -> list[dict[str, Any]]:
    """A text of each of the sampled epochs: `{"epoch", "prompt", "text"}`, as `results.json` has them.

    An epoch whose text cannot be made, as its checkpoint is damaged or memory has no room, is left out with a `Note`.

    Args:
      like: parameters of the same shapes.
      pieces: (parameters) -> the pieces of a text.
      separator: between them.
    """
    samples = list[dict[str, Any]]()
    for epoch in sampled_epochs(checkpoints.epochs):
        try:
            text = separator.join(pieces(checkpoints.params(epoch, like)))
        except InputError as error:
            warnings.warn(f"no text of epoch {epoch} for the report: {error}", Note, stacklevel=2)
            continue
        samples.append({"epoch": epoch, "prompt": prompt, "text": text})
    return samples
