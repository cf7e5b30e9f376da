"""Texts of many prompts at once. The loop takes prompts of one length; those of a file are put together by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.bars import progress_bar
from newllm_jax.decoding.sampling import Sampling

# (prompts `[B, length]`, a key for each) -> ids and exits `[B, n]`, a few tokens of each text at a time
Make: TypeAlias = Callable[[np.ndarray, jax.Array], Iterator[tuple[np.ndarray, np.ndarray]]]


class Batches(NamedTuple):
    """How many texts are asked for.

    Attributes:
      max_words: of each, at most; of a SmolLM2 tokens.
      seed: of the first text; each has one more than the one before.
      batch: the most texts at a time.
    """

    max_words: int
    seed: int
    sampling: Sampling
    batch: int


def texts_of_prompts(prompts: Sequence[Sequence[int]], make: Make, end: int | None, asked: Batches) -> list[list[int]]:
    """The ids that follow each prompt, without its end: those of a text by itself with the seed of its number.

    Args:
      prompts: ids of each, at least one.
      make: the loop for prompts of one length.
      end: the id that ends a text; None: none does.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    with progress_bar("texts", len(prompts)) as advance:
        for numbers in same_lengths(prompts, asked.batch):
            # As many rows as a power of two, so that batches share compiled programs; those after the last repeat it.
            size = min(1 << (len(numbers) - 1).bit_length(), asked.batch)
            rows = numbers + numbers[-1:] * (size - len(numbers))
            keys = jnp.stack([jax.random.key(asked.seed + number) for number in rows])
            pieces = [ids for ids, _ in make(np.asarray([prompts[number] for number in rows]), keys)]
            for row, number in enumerate(numbers):
                ids = [token for piece in pieces for token in piece[row].tolist()]
                texts[number] = ids[: ids.index(end)] if end in ids else ids
            advance(len(numbers))
    return texts


def same_lengths(prompts: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """The numbers of all prompts, at most `batch` of one length at a time, the shortest first."""
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    for _, numbers in sorted(by_length.items()):
        for first in range(0, len(numbers), batch):
            yield numbers[first : first + batch]
