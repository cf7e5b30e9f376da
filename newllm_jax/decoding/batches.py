"""Texts of many prompts at once. The loop takes prompts of one length; those of a file are put together by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

# (prompts `[B, length]`, a key for each) -> ids and exits `[B, n]`, a few tokens of each text at a time
Make: TypeAlias = Callable[[np.ndarray, jax.Array], Iterator[tuple[np.ndarray, np.ndarray]]]


def texts_of_prompts(
    prompts: Sequence[Sequence[int]],
    make: Make,
    seed: int,
    end: int | None,
    batch: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The ids that follow each prompt, without its end: those of a text by itself with the seed `seed` + its number.

    Args:
      prompts: ids of each, at least one.
      make: the loop for prompts of one length.
      end: the id that ends a text; None: none does.
      batch: the most texts at a time.
      advance: told how many texts are done, as they are.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    for numbers in same_lengths(prompts, batch):
        # As many rows as a power of two, so that batches share compiled programs; those after the last repeat it.
        rows = [*numbers, *[numbers[-1]] * ((1 << (len(numbers) - 1).bit_length()) - len(numbers))]
        keys = jnp.stack([jax.random.key(seed + number) for number in rows])
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
