"""Clusters of thread blocks that take some rows of a batch through all steps together (compute capability 9.0).

A cluster has N thread blocks and R rows of the batch. Each block computes 64 columns of every layer; then the cluster
*exchanges* them: a block writes its columns to device memory, reads them at once, and the hardware hands what it reads
to the shared memory of all N blocks (multicast). So no block waits for more than the columns that it multiplies.

Two slots of shared memory hold exchanged columns in turn. Nobody overwrites what another block still reads: a block
sends exchange n + 2 after it has received exchange n + 1 of all blocks, which they send when they have read exchange n.

Weights do not fit into shared memory. They are streamed in *chunks* of D tiles of 64 x 64, in the order in which they
are multiplied, the same in every step: a chunk is asked for as soon as one before it has been read.

Shapes follow the legend of `gpu_forward_kernel.py`; here H = C = 64 N, and S are the chunks of a step. Written for
Pallas's Mosaic GPU back end, in which a kernel is the program of all threads of a block.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from newllm_jax.newllm.recurrence.cluster_tiling import COLUMNS, ROWS, SLOTS, tiles_of_chunk

mosaic: Any = plgpu  # of whose names pyright may see those of an older JAX


class Shared(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      held: exchanged columns, `[2, N, R, 64]`.
      weights: chunks, `[SLOTS, D, 64, 64]`.
      tile: what is on its way to device memory, `[R, 64]`.
      masks: this block's columns of dropout masks, of which one is drawn while the other is used: `[2, R, 64]`.
      vectors: `[V, 64]`, this block's columns of what each row is added to or multiplied with.
      row_values: this block's two numbers of each row, `[2, R]`.
      all_row_values: those of all blocks, `[N, 2, R]`.
      held_arrived, weights_arrived, vectors_arrived, row_values_arrived: the barriers of what is copied to them.
      masks_drawn, masks_used: the barriers of the masks.
      all_here: of the cluster.
    """

    held: Any
    weights: Any
    tile: Any
    masks: Any
    vectors: Any
    row_values: Any
    all_row_values: Any
    held_arrived: Any
    weights_arrived: Any
    vectors_arrived: Any
    row_values_arrived: Any
    masks_drawn: Any
    masks_used: Any
    all_here: Any


class Between(NamedTuple):
    """Device memory through which the blocks of a cluster exchange; G are the clusters of all members.

    Attributes:
      columns: bf16 `[2, G, N, R, 64]`.
      row_values: `[G, N, 2, R]`.
    """

    columns: Any
    row_values: Any

    @classmethod
    def for_clusters(cls, clusters: int, blocks: int) -> Self:
        """Shapes and types."""
        return cls(
            jax.ShapeDtypeStruct((2, clusters, blocks, ROWS, COLUMNS), jnp.bfloat16),
            jax.ShapeDtypeStruct((clusters, blocks, 2, ROWS), jnp.float32),
        )


def shared_for(blocks: int, vectors: int) -> Shared:
    """What a block of a cluster needs."""

    def matrix(*shape: int, kind: Any = jnp.bfloat16) -> Any:
        number = 128 // jnp.dtype(kind).itemsize  # of a row of swizzled memory
        return plgpu.SMEM(shape, kind, transforms=(plgpu.TilingTransform((8, number)), plgpu.SwizzleTransform(128)))

    return Shared(
        held=matrix(2, blocks, ROWS, COLUMNS),
        weights=matrix(SLOTS, tiles_of_chunk(blocks), COLUMNS, COLUMNS),
        tile=matrix(ROWS, COLUMNS),
        masks=matrix(2, ROWS, COLUMNS),
        vectors=plgpu.SMEM((vectors, COLUMNS), jnp.float32),
        row_values=plgpu.SMEM((2, ROWS), jnp.float32),
        all_row_values=plgpu.SMEM((blocks, 2, ROWS), jnp.float32),
        held_arrived=plgpu.Barrier(num_barriers=2),
        weights_arrived=plgpu.Barrier(num_barriers=SLOTS),
        vectors_arrived=plgpu.Barrier(),
        row_values_arrived=plgpu.Barrier(),
        masks_drawn=plgpu.Barrier(num_barriers=2),
        masks_used=plgpu.Barrier(num_barriers=2),
        all_here=plgpu.ClusterBarrier(collective_axes=("rank",)),
    )


class Rows:
    """Which rows and columns a block computes.

    Attributes:
      number, rank: of the cluster, and of the block in it.
      member: whose rows they are.
      first_row, rows: the cluster's rows of the batch.
    """

    def __init__(self, batch: int) -> None:
        """For members with so many rows, whole clusters."""
        self.number, self.rank = lax.axis_index("cluster"), lax.axis_index("rank")
        clusters = batch // ROWS
        self.member, self.first_row = self.number // clusters, lax.rem(self.number, clusters) * ROWS
        self.rows = pl.ds(self.first_row, ROWS)


class Cluster(Rows):
    """A block's view of its cluster.

    Attributes:
      blocks: N.
      here: this block's columns.
      per_product: chunks of a product.
    """

    def __init__(self, shared: Shared, between: Between, weights: Any, vectors: Any, batch: int, steps: int) -> None:
        """Asks for the first chunks, and waits until all blocks of the cluster have begun.

        Args:
          weights: `[M, N, S, D, 64, 64]` in device memory, transposed: `[out, in]`.
          vectors: `[M, N, V, 64]`.
          batch: rows of a member, whole clusters.
          steps: how often the weights are read.
        """
        super().__init__(batch)
        self.shared, self.between, self.weights = shared, between, weights
        self.blocks, self.chunks, self.depth = weights.shape[1:4]
        self.per_product, self.all_chunks = self.blocks // self.depth, steps * self.chunks
        self.here = self.columns()
        plgpu.copy_gmem_to_smem(vectors.at[self.member, self.rank], shared.vectors, shared.vectors_arrived)
        for chunk in range(SLOTS):
            self._ask_for(jnp.int32(chunk))
        plgpu.barrier_wait(shared.vectors_arrived)
        self.wait_for_all()

    def finish(self) -> None:
        """Ends this block's program when all of the cluster have: nobody writes to memory of one that has ended."""
        plgpu.wait_smem_to_gmem(0)
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """Waits for the other blocks; before the first exchange, too: one that has not begun cannot be written to."""
        plgpu.barrier_arrive(self.shared.all_here)
        plgpu.barrier_wait(self.shared.all_here)

    def columns(self, part: int = 0) -> Any:
        """This block's columns of an array; of one part, where several lie side by side (the gates)."""
        return pl.ds((part * self.blocks + self.rank) * COLUMNS, COLUMNS)

    def vector(self, number: Any) -> jax.Array:
        """One of `vectors`, for each row: `[R, 64]`."""
        return lax.broadcast_in_dim(self.shared.vectors[number], (ROWS, COLUMNS), (1,))

    def _ask_for(self, chunk: Any) -> None:
        """Starts to load a chunk, counted over all steps, where there is one."""

        @pl.when(chunk < self.all_chunks)
        def _() -> None:
            slot, source = lax.rem(chunk, SLOTS), self.weights.at[self.member, self.rank, lax.rem(chunk, self.chunks)]
            plgpu.copy_gmem_to_smem(source, self.shared.weights.at[slot], self.shared.weights_arrived.at[slot])

    def product(self, exchanged: Any, first: Any) -> jax.Array:
        """Exchanged columns times the weights of this block's columns, summed in float32: `[R, 64]`.

        Args:
          exchanged: the number of the exchange.
          first: the number of the first chunk, counted over all steps.
        """
        shared, held = self.shared, self.shared.held.at[lax.rem(exchanged, 2)]

        def multiply(sums: Any) -> jax.Array:
            for part in range(self.per_product):
                slot = lax.rem(first + part, SLOTS)
                plgpu.barrier_wait(shared.weights_arrived.at[slot])
                for tile in range(self.depth):
                    kernel = shared.weights.at[slot, tile].transpose((1, 0))
                    plgpu.wgmma(sums, held.at[part * self.depth + tile], kernel)
                if part:
                    plgpu.wgmma_wait(self.depth)  # only this part is still read
                    self._ask_for(first + part - 1 + SLOTS)
            return sums[...]

        x = pl.run_scoped(multiply, mosaic.ACC((ROWS, COLUMNS), jnp.float32))
        self._ask_for(first + self.per_product - 1 + SLOTS)
        return x

    def exchange(
        self,
        number: Any,
        x: jax.Array,
        store: Callable[[Any], None] | None = None,
        meanwhile: Callable[[], Any] = lambda: (),
    ) -> Any:
        """Sends this block's columns to all blocks, and waits for theirs.

        Args:
          number: counts the exchanges, from 0.
          x: `[R, 64]`; rounded to bf16.
          store: starts a copy of the rounded columns, in shared memory, to where the backward pass or XLA reads them.
          meanwhile: work for the time until the others' columns are there.

        Returns:
          The result of `meanwhile`.
        """
        shared, slot = self.shared, lax.rem(number, 2)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        shared.tile[...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        between = self.between.columns.at[slot, self.number]
        plgpu.copy_smem_to_gmem(shared.tile, between.at[self.rank])
        if store:
            store(shared.tile)
        plgpu.wait_smem_to_gmem(1 if store else 0)  # the first of both is in device memory
        plgpu.copy_gmem_to_smem(between, shared.held.at[slot], shared.held_arrived.at[slot], collective_axes="rank")
        found = meanwhile()
        plgpu.barrier_wait(shared.held_arrived.at[slot])
        return found

    def exchange_row_values(
        self, values: Sequence[jax.Array], meanwhile: Callable[[], None] = lambda: None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Two numbers of each row, `[R]` each, from all blocks; arguments of `exchange`."""
        shared, between = self.shared, self.between.row_values.at[self.number]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for place, value in enumerate(values):
            shared.row_values[place] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.row_values, between.at[self.rank])
        plgpu.wait_smem_to_gmem(0)
        plgpu.copy_gmem_to_smem(between, shared.all_row_values, shared.row_values_arrived, collective_axes="rank")
        meanwhile()
        plgpu.barrier_wait(shared.row_values_arrived)
        first, second = ([shared.all_row_values[rank, place] for rank in range(self.blocks)] for place in range(2))
        return first, second


def to(place: Any) -> Callable[[Any], None]:
    """For `Cluster.exchange`: stores the columns at a place in device memory."""
    return lambda tile: plgpu.copy_smem_to_gmem(tile, place)


def load(reference: Any) -> jax.Array:
    """This block's part of an array in device memory, `[R, 64]`, in the registers in which products give theirs."""
    return mosaic.load(reference, layout=plgpu.Layout.WGMMA, optimized=False)


def load_by_rows(reference: Any) -> jax.Array:
    """A number of each row, `[R]` in device memory, for each column: `[R, 64]`."""
    return by_rows(mosaic.load(reference, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False))


def by_rows(x: jax.Array) -> jax.Array:
    """`[R]` for each column: `[R, 64]`."""
    return lax.broadcast_in_dim(x, (ROWS, COLUMNS), (0,))


def sum_over_blocks(values: Sequence[jax.Array]) -> jax.Array:
    """The sum of what the blocks of a cluster sent, in their order."""
    return reduce(operator.add, values)


def sigmoid(x: jax.Array) -> jax.Array:
    """In operations that are fast here, of which division is none."""
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return root * root
