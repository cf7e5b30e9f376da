"""Thread blocks that compute some rows of a batch together: their shares, barrier, matrix product and LayerNorm.

A launch computes one model, or several of the same sizes (`jax.vmap`): its *members*, each with its own batch and
weights. A *group* is `Tiling.blocks` thread blocks of one launch. It takes `Tiling.rows` rows of the batch of a member
through all steps, and no group ever waits for another. Within a group, the columns of every layer are shared out
evenly, and the blocks wait for each other (`training/grid_barrier.py`). Blocks are assigned to groups in the order in
which they start, so the running blocks form whole groups, and a group never waits for a block that cannot start: no
deadlock.

Shapes follow the legend of `gpu_forward_kernel.py`. Written for Pallas's Triton back end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from newllm_jax.newllm.recurrence.cell import CONTEXT_BOUND, NORM_EPSILON
from newllm_jax.newllm.recurrence.gpu_tiling import Tiling
from newllm_jax.training.grid_barrier import wait_for_blocks


def sigmoid(x: jax.Array) -> jax.Array:
    """Written out: Triton has no such operation."""
    return 1.0 / (1.0 + jnp.exp(-x))


class MemberReference:
    """A reference to an array of all members, `[M, ...]`, as one of them sees it: without the first axis."""

    def __init__(self, reference: Any, member: Any) -> None:
        self.reference, self.member = reference, member
        self.shape, self.dtype = reference.shape[1:], reference.dtype

    def __getitem__(self, index: Any) -> jax.Array:
        return self.reference[self._whole(index)]

    def __setitem__(self, index: Any, x: jax.Array) -> None:
        self.reference[self._whole(index)] = x

    def _whole(self, index: Any) -> tuple[Any, ...]:
        return (self.member, *index) if isinstance(index, tuple) else (self.member, index)


class Group:
    """One thread block's view of its group.

    Attributes:
      index: the group's number in the launch.
      member: whose rows it computes.
      rank: this block's number in the group.
      first_row, rows: the group's rows of the batch.
      own_rows: this block's share of those, for phases that need whole rows; at least one.
      has_rows: whether that share is this block's alone. With more blocks than rows, the last blocks have none.
      shares: the first N of an axis that has a number of each block, and room for those of the largest groups.
    """

    def __init__(self, tiling: Tiling, counters: Any, alone: bool, precision: Any, members: int, batch: int) -> None:
        """Takes a ticket, which assigns this block to a group.

        Tickets follow start order, which the numbers of a grid need not. So the running blocks always form whole groups
        but for the last one, whose missing blocks start as soon as whole groups have finished: no deadlock, if the GPU
        can run the blocks of one group at the same time.

        Args:
          counters: int32 `[groups of all members + 1]` in device memory, zeros at the launch: each group's arrivals at
            its barriers, and the tickets given so far.
          alone: the group has one block, so there is nobody to wait for; the interpreter runs blocks one by one.
          precision: of the matrix products.
          members, batch: how many there are, and the rows of each, which are whole groups.
        """
        self.tiling, self.counters, self.alone, self.precision = tiling, counters, alone, precision
        groups, share = batch // tiling.rows, max(tiling.rows // tiling.blocks, 1)
        ticket = plgpu.atomic_add(counters, (jnp.int32(members * groups),), jnp.int32(1))
        self.index, self.rank = ticket // tiling.blocks, ticket % tiling.blocks
        self.member, self.first_row = self.index // groups, self.index % groups * tiling.rows
        self.rows = pl.ds(self.first_row, tiling.rows)
        self.own_rows = pl.ds(self.first_row + jnp.minimum(self.rank * share, tiling.rows - share), share)
        self.has_rows = self.rank * share < tiling.rows
        self.shares = pl.ds(0, tiling.blocks)

    def member_references(self, references: Any) -> Any:
        """References of its member, from a named tuple of those of all members; None stays."""
        return type(references)(*(None if each is None else MemberReference(each, self.member) for each in references))

    def columns(self, width: int, part: int = 0) -> Any:
        """This block's share of the columns, as a slice of `width / blocks`.

        Args:
          width: of the array; of one part, where several of the same width lie side by side (the gates).
          part: which of those.
        """
        share = width // self.tiling.blocks
        return pl.ds(part * width + self.rank * share, share)

    def barrier(self, arrivals: Any, meanwhile: Callable[[], Any] = lambda: ()) -> tuple[Any, Any, Any]:
        """`wait_for_blocks`, for those of the group: what the next phase reads has been written then."""
        if self.alone:
            return arrivals + self.tiling.blocks, jnp.int32(0), meanwhile()
        return wait_for_blocks(self.counters, self.index, self.tiling.blocks, arrivals, meanwhile)

    def product(
        self, left: Callable[[Any], jax.Array], rights: list[Callable[[Any], jax.Array]], inner: int, columns: int
    ) -> list[jax.Array]:
        """left @ right for each right operand, summed in float32 over slices k of the inner dimension.

        Args:
          left: loads `left[:, k]`, `[rows, depth]`, of all rows of the group.
          rights: load `right[k, :]`, transposed: `[columns, depth]`.
          inner: size of the inner dimension.
          columns: of each result.

        Returns:
          Per right operand float32 `[rows, columns]`.
        """
        depth = min(self.tiling.depth, inner)
        while inner % depth:
            depth //= 2

        def accumulate(step: Any, sums: list[jax.Array]) -> list[jax.Array]:
            k = pl.ds(step * depth, depth)
            tile = left(k)
            return [
                partial_sum + jnp.dot(tile, right(k).T, precision=self.precision, preferred_element_type=jnp.float32)
                for partial_sum, right in zip(sums, rights, strict=True)
            ]

        zeros = [jnp.zeros((self.tiling.rows, columns), jnp.float32) for _ in rights]
        return jax.lax.fori_loop(0, inner // depth, accumulate, zeros)


class MixedContexts:
    """m_t, the contexts before their LayerNorm: written by columns, read normalised.

    A block stores, with its columns of m_t, their mean and their sum of squared deviations; whoever reads m_t merges
    the statistics of all N shares (Chan et al. 1979):

        mean     = sum_n mean_n / N
        variance = (sum_n squares_n + C/N * sum_n (mean_n - mean)^2) / C

    This saves the barrier that a group would need between the mean of a row and the deviations from it. The other way
    to save it, sums and sums of squares, loses digits where the mean is large.

    Attributes:
      own: this block's columns.
      mixed: `[T + 1, B, C]`.
      means, squares: `[T + 1, B, N']`, of each share: its mean, and its sum of squared deviations from that.
    """

    def __init__(
        self, group: Group, own: Any, mixed: Any, means: Any, squares: Any, norm_scale: Any, norm_bias: Any
    ) -> None:
        self.group, self.own, self.mixed, self.means, self.squares = group, own, mixed, means, squares
        self.norm_scale, self.norm_bias = norm_scale, norm_bias

    def store(self, t: Any, x: jax.Array) -> None:
        """This block's columns of m_t, `[R, C/N]`, and their statistics."""
        group, rank = self.group, pl.ds(self.group.rank, 1)
        self.mixed[t, group.rows, self.own] = x
        mean = (jnp.sum(x, 1) / self.own.size)[:, None]
        self.means[t, group.rows, rank] = mean
        self.squares[t, group.rows, rank] = jnp.sum((x - mean) * (x - mean), 1)[:, None]

    def statistics(self, t: Any) -> tuple[jax.Array, jax.Array]:
        """Mean and 1 / standard deviation of the rows of m_t, `[R, 1]` each."""
        means, squares = (each[t, self.group.rows, self.group.shares] for each in (self.means, self.squares))
        mean = jnp.sum(means, 1) / self.group.tiling.blocks
        off = means - mean[:, None]
        variance = jnp.sum(squares + self.own.size * off * off, 1) / self.mixed.shape[-1]
        return mean[:, None], jax.lax.rsqrt(variance + NORM_EPSILON)[:, None]

    def context(self, t: Any, columns: Any, mean: jax.Array, inverse: jax.Array) -> jax.Array:
        """c_t = clip(LayerNorm(m_t)), these columns of it; m_0 is c_0, which is not normalised."""
        x = self.mixed[t, self.group.rows, columns]
        y = (x - mean) * inverse * self.norm_scale[columns][None, :] + self.norm_bias[columns][None, :]
        return jnp.where(t > 0, jnp.clip(y, -CONTEXT_BOUND, CONTEXT_BOUND), x)
