"""Thread blocks that work on some rows of a batch together: their shares, their meetings, their products.

Written for Pallas's Triton backend; the kernels of the time loop in `kernel.py` are made of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
      rows: rows of the batch in a group.
      blocks: thread blocks in a group; each computes 1 / blocks of the columns.
      depth: how much of a product's inner dimension is loaded at a time.
      warps: of a thread block.
      stages: loads in flight.
    """

    rows: int
    blocks: int
    depth: int
    warps: int
    stages: int


class Group:
    """One thread block's view of its group."""

    def __init__(self, tiling: Tiling, counters: Any, alone: bool, precision: Any, groups: int) -> None:
        self.tiling, self.counters, self.alone, self.precision = tiling, counters, alone, precision
        # Numbers are given out as blocks start, so those that run are always whole groups but for the last, and none
        # waits for a block that cannot start before it ends.
        ticket = plgpu.atomic_add(counters, (jnp.int32(groups),), jnp.int32(1))
        self.index, self.number = ticket // tiling.blocks, ticket % tiling.blocks
        first, share = self.index * tiling.rows, tiling.rows // tiling.blocks
        self.rows = pl.ds(first, tiling.rows)
        self.own_rows = pl.ds(first + self.number * share, share)

    def columns(self, width: int, part: int = 0) -> Any:
        """This block's share of `width` columns, in the given one of several such parts side by side."""
        share = width // self.tiling.blocks
        return pl.ds(part * width + self.number * share, share)

    def meet(self, arrivals: Any, meanwhile: Callable[[], Any] = lambda: ()) -> tuple[Any, Any, Any]:
        """Waits until all blocks of the group have written what the next phase reads.

        Args:
          arrivals: how many there have been at earlier meetings.
          meanwhile: what to do while others arrive. What it writes, other blocks may read after the next meeting only.

        Returns:
          `arrivals` after this meeting; a zero that was computed from what was read, for an index with it added keeps
          the next phase's loads behind the wait; and what `meanwhile` gave.
        """
        arrivals = arrivals + self.tiling.blocks
        if self.alone:
            return arrivals, jnp.int32(0), meanwhile()
        plgpu.debug_barrier()  # all threads of this block have written
        old = plgpu.atomic_add(self.counters, (self.index,), jnp.int32(1))  # which also publishes it
        needs = meanwhile()
        seen = jax.lax.while_loop(
            lambda seen: seen < arrivals,
            lambda _: plgpu.load(self.counters.at[self.index], volatile=True),
            old + 1,
        )
        return arrivals, jnp.minimum(seen - arrivals, 0), needs

    def product(self, x: Callable[[Any], jax.Array], ws: list[Callable[[Any], jax.Array]], inner: int, columns: int):
        """x @ w for each w: `[rows, columns]`, from functions that load `x[:, k]` and `w[:, k].T` for a slice k."""
        depth = min(self.tiling.depth, inner)
        while inner % depth:
            depth //= 2

        def add(k: Any, sums: list[jax.Array]) -> list[jax.Array]:
            part = pl.ds(k * depth, depth)
            tile = x(part)
            return [
                total + jnp.dot(tile, w(part).T, precision=self.precision, preferred_element_type=jnp.float32)
                for total, w in zip(sums, ws, strict=True)
            ]

        zeros = [jnp.zeros((self.tiling.rows, columns), jnp.float32) for _ in ws]
        return jax.lax.fori_loop(0, inner // depth, add, zeros)
