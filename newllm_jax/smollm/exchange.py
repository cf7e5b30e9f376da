"""How the thread blocks of a GPU kernel hand numbers to each other, without a barrier: by the numbers themselves.

Numbers that one block writes and others read lie in one array in device memory, which the launch fills with a pattern
of bits that no result of arithmetic has. A reader loads what it needs over and over, until none of it is that pattern.
A barrier takes three times as long: the writer's stores have to be complete before it says so, and what a reader then
reads is one more round trip to memory.

Each place is written once in a launch, so that no reader can take an old number for a new one. A number is one word,
which arrives whole; that words arrive in no order does not matter, as each is looked at.

Written for Pallas's Triton back end.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

# All bits set: a NaN, but not the one that a GPU's arithmetic gives (0x7FFFFFFF), so that NaNs arrive as well.
NOT_WRITTEN = -1


LINE = 32  # numbers of a cache line


class Exchange:
    """One vector of each layer, which blocks write and others wait for.

    Attributes:
      reference: int32 `[L, numbers]`, `NOT_WRITTEN` at the launch: the vectors of all exchanges, one after the other.
      first: the place of this one's first number.
      size: its numbers.
    """

    def __init__(self, reference: Any, first: int, size: int) -> None:
        self.reference, self.first, self.size = reference, first, size

    def write(self, layer: Any, places: Any, x: jax.Array) -> None:
        """Writes float32 numbers to their places in a layer's vector."""
        self.reference[layer, self.first + places] = jax.lax.bitcast_convert_type(x, jnp.int32)

    def read(self, layer: Any, *places: Any) -> list[jax.Array]:
        """The numbers at some arrays of places, once all of them have been written."""

        found = self._wait(layer, places)
        return [jax.lax.bitcast_convert_type(each, jnp.float32) for each in found]

    def read_spread(self, layer: Any, places: Any) -> jax.Array:
        """Numbers of a short vector, many times each, once the whole vector has been written.

        Waiting goes around the cache of the multiprocessor, which is slow for so many loads; so the block waits for the
        vector first, then loads through the cache. No load through it has touched the vector's lines before.
        """
        every = jnp.minimum(jax.lax.iota(jnp.int32, 1 << (self.size - 1).bit_length()), self.size - 1)

        zero = jnp.minimum(
            _missing(self._wait(layer, (every,))), 0
        )  # which the compiler does not know, or it would load before it waits
        return jax.lax.bitcast_convert_type(self.reference[layer + zero, self.first + places], jnp.float32)

    def _wait(self, layer: Any, places: Sequence[Any]) -> tuple[jax.Array, ...]:
        def load() -> tuple[jax.Array, ...]:
            return tuple(plgpu.load(self.reference.at[layer, self.first + each], volatile=True) for each in places)

        return jax.lax.while_loop(lambda found: _missing(found) > 0, lambda _: load(), load())


def exchanges(reference: Any, sizes: Sequence[int]) -> list[Exchange]:
    """Exchanges of some sizes, one after the other, each with cache lines of its own."""
    firsts = [sum(map(whole_lines, sizes[:number])) for number in range(len(sizes))]
    return [Exchange(reference, first, size) for first, size in zip(firsts, sizes, strict=True)]


def whole_lines(size: int) -> int:
    """The numbers of the cache lines that hold so many."""
    return -(-size // LINE) * LINE


def _missing(found: tuple[jax.Array, ...]) -> jax.Array:
    """How many of some arrays lack numbers."""
    return reduce(operator.add, (jnp.max(jnp.where(each == NOT_WRITTEN, 1, 0)) for each in found))
