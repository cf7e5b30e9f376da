"""Dropout whose masks are hashes of places: any part of a mask can be computed alone, and none is ever stored.

Whether a number is kept is a pure function of two seeds and its place in its array. So the forms of the time loop draw
the same masks, each in its own order, and a part of a batch sees its rows of the batch's masks.

Rates can be arrays like the seeds, not constants of the program, so that trainings with different rates can share one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np


class Rate(NamedTuple):
    """A dropout rate in the numbers that masks use; each is rounded once, from the exact rate.

    Attributes:
      least: uint32, the least hash of a number that is kept.
      kept: float32, the share that is kept, `1 - rate`.
      scale: float32, `1 / (1 - rate)`.
    """

    least: Any
    kept: Any
    scale: Any

    @classmethod
    def from_share(cls, rate: float) -> Self:
        """From the share that is dropped, from 0 to below 1. At 0 nothing is dropped, or changed."""
        least = np.uint32(min(round(rate * 2**32), 2**32 - 1))
        return cls(least, np.float32(1 - rate), np.float32(1 / (1 - rate)))


class Dropout(NamedTuple):
    """What masks are drawn from: seeds, uint32 `[2]`, and a rate."""

    seeds: jax.Array
    rate: Rate

    @classmethod
    def from_key(cls, key: jax.Array, rate: Rate, first: jax.Array | int = 0) -> Self:
        """The masks of a key.

        Args:
          first: the place of the first number at hand, where it is a part of a larger array.
        """
        seeds = jax.random.bits(key, (2,), jnp.uint32)
        return cls(seeds.at[0].add(jnp.uint32(first)), rate)  # it is added to all places

    def keeps(self, places: jax.Array) -> jax.Array:
        """Which numbers are kept, bool like their `places` (uint32)."""
        return dropout_mask(self.seeds, self.rate.least, places)

    def drop(self, x: jax.Array, shape: tuple[int, ...] | None = None) -> jax.Array:
        """Dropout of an array.

        Args:
          shape: of the mask, which is broadcast to the array; None: that of the array.
        """
        shape = x.shape if shape is None else shape
        places = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
        scaled = (x.astype(jnp.float32) / self.rate.kept).astype(x.dtype)
        return jnp.where(self.keeps(places), scaled, jnp.zeros((), x.dtype))


def dropout_mask(seeds: Any, least: Any, places: jax.Array) -> jax.Array:
    """Which numbers are kept: bool like `places`, each True with probability `1 - rate`, independently.

    The hash is two rounds of a 32-bit mixer in which every input bit flips each output bit with probability one half.

    Args:
      seeds: two uint32.
      least: of `Rate`.
      places: uint32, different for every number.
    """

    def mix(x: jax.Array) -> jax.Array:
        x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
        return x ^ (x >> jnp.uint32(16))

    return mix(mix(places + seeds[0]) ^ seeds[1]) >= jnp.uint32(least)
