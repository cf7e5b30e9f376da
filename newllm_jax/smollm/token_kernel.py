"""One token of one text through all layers of a Llama as one GPU kernel, instead of a dozen launches a layer.

A token costs little more than reading the weights once: too little for launches to be hidden behind it. Here every
layer has five phases (`layers_kernel`), between which all thread blocks of the GPU wait for each other. Weights do not
depend on the token, nor do the keys and values before it: while a block waits, it loads those of a later phase into
registers. What is left is the time in which numbers go from one block to another through device memory, so a phase has
as few steps in a row as possible: warps wait for each other only where they must (`block_rows.py`).

In shapes, L is the layers, H the hidden size, I the intermediate size, Q the query heads, K the heads of keys and
values, D their size (64), and S the splits of attention. Numbers are float32; weights, keys and values are stored in
the model's type.

Written for Pallas's Triton back end. `fused_decoder.py` calls this.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from newllm_jax.smollm.block_rows import BlockRows, inverse_rms, one_slice, products
from newllm_jax.smollm.kernel_shares import CHUNK, SPLITS
from newllm_jax.smollm.kernel_weights import Kernels
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.training.grid_barrier import wait_for_blocks

POSITIONS = 32  # of keys and values that are loaded at a time; a cache has room for a multiple of it
WARPS = 8  # of a thread block
TILE_ROWS = 16  # positions of which a thread has one: a warp has two
LOWEST = -1e30  # a score that counts as none; with an infinite one, the difference of two would be NaN


class Inputs(NamedTuple):
    """What the kernel reads.

    Attributes:
      position: of the token in its text, `[1]`.
      rotary: cosine and sine of its angles, `[2, D]`, the sine of the first half negative.
      x: `[H]`, the residual stream before the first layer.
      kernels: the parameters.
    """

    position: Any
    rotary: Any
    x: Any
    kernels: Kernels


class Results(NamedTuple):
    """What the kernel writes; all but the first three are scratch.

    Attributes:
      keys, values: `[L, capacity, K, D]`, those of the positions before; at this position the kernel writes.
      streams: `[L, H]`, the residual stream after each layer.
      middles: `[L, H]`, after the attention of each.
      query_key_value: `[L, (Q + 2 K) D]`, not turned yet.
      logarithms: `[L, S, Q D]`, of each split of a head log(sum(exp(score))), as often as the head has columns.
      mixes: `[L, S, Q D]`, of each split the mix of its values, weighted by the softmax of its scores.
      activations: `[L, I]`, of the feed-forward network.
    """

    keys: Any
    values: Any
    streams: Any
    middles: Any
    query_key_value: Any
    logarithms: Any
    mixes: Any
    activations: Any


def layers_kernel(*references: Any, config: LlamaConfig, blocks: int) -> None:
    """All layers of one token. A layer has five phases; each ends with a barrier of all blocks.

        1. q, k, v = RMSNorm(x) W_qkv
        2. per query head, and per split of the positions: with the scores s = q k / sqrt(D) of q and k turned by their
           positions,
             logarithm = log(sum(exp(s)));  mix = sum(exp(s - logarithm) v)
           The split that has the token's position writes its key and value to the cache.
        3. heads = sum_splits(weight mix) / sum_splits(weight), weight = exp(logarithm - max_splits(logarithm))
           m = x + heads W_o
        4. a = silu(RMSNorm(m) W_gate) * RMSNorm(m) W_up
        5. x' = m + a W_down

    In phases 1, 3, 4 and 5, a block computes some of the outputs: columns of W here, rows of what `Kernels` stores.
    RMSNorm divides by one number, so the products are divided by it; its scales are in the weights.

    Args:
      references: of the inputs, of the caches and the counter that were given, and of the results and the counter.
      blocks: of the launch, all of which run at the same time.
    """
    inputs, results, counter = _named(references)
    kernels, rank = inputs.kernels, pl.program_id(0)
    attention = Attention(config, inputs, results)
    hidden, inner = config.hidden_size, config.intermediate_size
    all_heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    of_qkv, of_stream, of_inner = (
        BlockRows(rows, rank, blocks, attention.opaque_zero) for rows in (all_heads, hidden, inner)
    )
    barrier = partial(wait_for_blocks, counter, 0, blocks)

    def normed(x: list[jax.Array], *matrices: Any) -> list[list[jax.Array]]:
        """The products of some matrices with RMSNorm(x)."""
        inverse = inverse_rms(x, hidden, config.rms_norm_eps)
        return [[product * inverse for product in products(tiles, x)] for tiles in matrices]

    def layer(number: Any, carry: Any) -> Any:
        arrivals, x, stream, qkv_tiles = carry
        # Phase 1.
        [found] = normed(x, qkv_tiles)
        of_qkv.store(results.query_key_value, number, found)
        arrivals, zero, (output_tiles, cached) = barrier(
            arrivals, lambda: (of_stream.load(kernels.output, number, slices=one_slice), attention.load(number, rank))
        )
        # Phase 2.
        attention.mix(number, number + zero, rank, cached)
        for turn in range(1, -(-attention.parts // blocks)):
            part = rank + turn * blocks
            attention.mix(number, number + zero, part, attention.load(number, part))
        arrivals, zero, gate_up = barrier(
            arrivals, lambda: [of_inner.load(kernels.gate_up, number, first) for first in (0, inner)]
        )
        # Phase 3.
        stream = _added(stream, products(output_tiles, attention.heads(number + zero)))
        of_stream.store(results.middles, number, stream)
        arrivals, zero, down_tiles = barrier(arrivals, lambda: of_stream.load(kernels.down, number))
        # Phase 4.
        found = normed(of_inner.load_vector(results.middles, number + zero), *gate_up)
        gated = [gate / (1.0 + jnp.exp(-gate)) * up for gate, up in zip(*found, strict=True)]
        of_inner.store(results.activations, number, gated)
        following = jnp.minimum(number + 1, config.num_layers - 1)  # of the last layer none follows
        arrivals, zero, qkv_tiles = barrier(arrivals, lambda: of_qkv.load(kernels.query_key_value, following))
        # Phase 5.
        stream = _added(stream, products(down_tiles, of_stream.load_vector(results.activations, number + zero)))
        of_stream.store(results.streams, number, stream)
        arrivals, zero, _ = barrier(arrivals)
        return arrivals, of_qkv.load_vector(results.streams, number + zero), stream, qkv_tiles

    stream = [inputs.x[start + jax.lax.iota(jnp.int32, of_stream.size)] for start in of_stream.starts]
    carry = jnp.int32(0), of_qkv.load_vector(inputs.x), stream, of_qkv.load(kernels.query_key_value, 0)
    jax.lax.fori_loop(0, config.num_layers, layer, carry)


def _added(stream: list[jax.Array], found: list[jax.Array]) -> list[jax.Array]:
    """This block's part of the residual stream with what a phase adds to it, an array for each tile."""
    return [before + each for before, each in zip(stream, found, strict=True)]


class Attention:
    """Phases 2 and 3 of `layers_kernel`.

    Attributes:
      parts: query heads times splits: what phase 2 shares out among the blocks.
      opaque_zero: a zero of which the compiler does not know that it is one, see `BlockRows.load`.
    """

    def __init__(self, config: LlamaConfig, inputs: Inputs, results: Results) -> None:
        self.config, self.results, self.position = config, results, inputs.position[0]
        self.shared = config.num_heads // config.num_kv_heads  # query heads of one head of keys and values
        self.parts = config.num_heads * SPLITS
        self.opaque_zero = jnp.minimum(self.position, 0)
        shape = TILE_ROWS, config.head_dim
        self.rows, self.columns = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
        self.cosine, self.sine = (inputs.rotary[part, self.columns] for part in range(2))

    def load(self, layer: Any, part: Any) -> list[jax.Array]:
        """What a part of phase 2 reads of the tokens before: keys and values of the first positions of its split."""
        _, kv_head, split = self._place(part)
        # Splits behind the end of the cache load its last positions, which may be half written, and see none.
        return self._cached(layer, kv_head, jnp.minimum(split * POSITIONS, self.results.keys.shape[1] - POSITIONS))

    def mix(self, layer: Any, layer_after_wait: Any, part: Any, first: list[jax.Array]) -> None:
        """Phase 2, of one part.

        A thread has some columns of one row of each `[TILE_ROWS, D]`. Until the last position, each row has a softmax
        of its own, so that warps need not wait for each other.

        Args:
          layer: its number.
          layer_after_wait: the same, for what other blocks wrote in phase 1: loads with it come after the wait.
          part: its number. There is no branch for blocks without a part, which would make the kernel compile slowly:
            they compute the last one. That they write nothing saves time only, as that of equal keys and values does.
          first: what `load` gave.
        """
        config, results = self.config, self.results
        head, kv_head, split = self._place(part)
        exists, start, capacity = part < self.parts, split * POSITIONS, results.keys.shape[1]
        query, key, value = self._new_token(layer_after_wait, head, kv_head)
        writes = exists & (head % self.shared == 0) & (self.position // POSITIONS % SPLITS == split)
        place = layer, jnp.minimum(self.position, capacity - 1), kv_head
        for cache, new in ((results.keys, key), (results.values, value)):
            self._store_row(cache, place, new, writes & (self.position < capacity))

        def add(start: Any, tile: Any, carry: Any) -> Any:
            """The positions from `start` on, of which keys and values before the new token are given."""
            largest, total, mixed = carry
            positions = start + self._positions()
            new_one = (positions == self.position)[:, :, None]
            keys, values = (
                jnp.where(new_one, new[None], cached.astype(jnp.float32))
                for new, cached in zip((key, value), tile, strict=True)
            )
            scores = jnp.sum(query[None] * keys, 2)  # [POSITIONS / TILE_ROWS, TILE_ROWS]
            scores = jnp.where(positions <= self.position, scores, LOWEST)
            larger = jnp.maximum(largest, jnp.max(scores, 0))
            weights, kept = jnp.exp(scores - larger[None]), jnp.exp(largest - larger)
            mixed = mixed * kept[:, None] + jnp.sum(weights[:, :, None] * values, 0)
            return larger, total * kept + jnp.sum(weights, 0), mixed

        def step(turn: Any, carry: Any) -> Any:
            start = (turn * SPLITS + split) * POSITIONS
            return add(start, self._cached(layer, kv_head, start), carry)

        none = jnp.zeros((TILE_ROWS,), jnp.float32)
        carry = add(start, first, (none + LOWEST, none, jnp.zeros(query.shape, jnp.float32)))
        seen, stride = jnp.minimum(self.position + 1, capacity), SPLITS * POSITIONS
        steps = (jnp.maximum(seen - start, 0) + stride - 1) // stride  # each has a position that is seen
        largest, total, mixed = jax.lax.fori_loop(1, steps, step, carry)
        # A row that sees no position has the scores LOWEST, and no weight beside one that sees some.
        highest = jnp.max(largest, 0)
        weights = jnp.exp(largest - highest)
        total = jnp.sum(total * weights, 0)
        mixed = jnp.sum(mixed * weights[:, None], 0) / total
        place = layer, split
        self._store_row(results.mixes, place, mixed[None], exists, head * config.head_dim)
        self._store_row(results.logarithms, place, highest + jnp.log(total), exists, head * config.head_dim)

    def _place(self, part: Any) -> tuple[Any, Any, Any]:
        """Of a part its query head, its head of keys and values, and its split."""
        part = jnp.minimum(part, self.parts - 1)
        head = part % self.config.num_heads
        return head, head // self.shared, part // self.config.num_heads

    def _positions(self) -> jax.Array:
        """From 0 to `POSITIONS`: `[POSITIONS / TILE_ROWS, TILE_ROWS]`."""
        tiles, rows = (jax.lax.iota(jnp.int32, size) for size in (POSITIONS // TILE_ROWS, TILE_ROWS))
        return tiles[:, None] * TILE_ROWS + rows[None, :]

    def _cached(self, layer: Any, kv_head: Any, start: Any) -> list[jax.Array]:
        """Keys and values of `POSITIONS` positions: `[POSITIONS / TILE_ROWS, TILE_ROWS, D]`."""
        positions = (start + self._positions())[:, :, None]
        columns = self.columns[None] + 4 * self.opaque_zero  # so that a thread loads 4, also of bfloat16
        return [cache[layer, positions, kv_head, columns] for cache in (self.results.keys, self.results.values)]

    def _new_token(self, layer: Any, head: Any, kv_head: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value of the token, turned by its position, each in all rows: `[TILE_ROWS, D]`."""
        config, columns, half = self.config, self.columns, self.config.head_dim // 2
        other = jnp.where(columns < half, columns + half, columns - half)  # that a number is turned with

        def turned(head: Any) -> jax.Array:
            one, two = (self.results.query_key_value[layer, head * config.head_dim + each] for each in (columns, other))
            return one * self.cosine + two * self.sine

        key = config.num_heads + kv_head
        value = self.results.query_key_value[layer, (key + config.num_kv_heads) * config.head_dim + columns]
        return turned(head) * config.head_dim**-0.5, turned(key), value

    def _store_row(self, reference: Any, place: tuple[Any, ...], value: Any, condition: Any, first: Any = 0) -> None:
        """Writes D columns from `first` on, if a condition holds: the first of some equal rows."""
        value = jnp.broadcast_to(value, self.columns.shape).astype(reference.dtype)
        plgpu.store(reference.at[*place, first + self.columns], value, mask=(self.rows == 0) & condition)

    def heads(self, layer: Any) -> list[jax.Array]:
        """The mixes of the values for all query heads, `[Q D]` as one slice `[chunks, 1, CHUNK]`: the splits together.

        Of 8 chunks or more, a warp has some of all splits.
        """
        splits, width = jax.lax.iota(jnp.int32, SPLITS)[:, None, None], self.results.mixes.shape[-1]
        [part] = one_slice(width)
        logarithms, mixes = (
            part.load(each, (layer, splits), (SPLITS, part.chunks, CHUNK), axis=1)
            for each in (self.results.logarithms, self.results.mixes)
        )
        weights = jnp.exp(logarithms - jnp.max(logarithms, 0)[None])
        return [(jnp.sum(weights * mixes, 0) / jnp.sum(weights, 0))[:, None, :]]


def run_layers(
    config: LlamaConfig,
    kernels: Kernels,
    caches: tuple[jax.Array, jax.Array],
    x: jax.Array,
    position: jax.Array,
    rotary: jax.Array,
    blocks: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """All layers on the next token of a text.

    Args:
      caches: keys and values `[L, capacity, K, D]`, finite also where no token is yet; the capacity is a multiple of
        `POSITIONS`.
      x: `[H]`, float32, the residual stream before the first layer.
      position: of the token, a scalar; its keys and values are written there, and it sees those up to it. One outside
        the cache is not written.
      rotary: cosine and sine of its angles, `[2, D / 2]`.
      blocks: thread blocks that the GPU can run at the same time.

    Returns:
      The residual stream `[H]` after the layers, float32, and the caches.

    Raises:
      ValueError: a cache of another capacity.
    """
    if caches[0].shape[1] % POSITIONS:
        raise ValueError(f"the cache has room for {caches[0].shape[1]} tokens, no multiple of {POSITIONS}")
    count, heads = config.num_layers, config.num_heads * config.head_dim
    shapes = [(count, config.hidden_size)] * 2 + [
        (count, heads + 2 * config.num_kv_heads * config.head_dim), (count, SPLITS, heads), (count, SPLITS, heads),
        (count, config.intermediate_size),
    ]  # fmt: skip
    counter = jnp.zeros((1,), jnp.int32)
    cosine, sine = rotary
    rotary = jnp.stack([jnp.tile(cosine, 2), jnp.concatenate([-sine, sine])])
    given = [position.reshape(1).astype(jnp.int32), rotary, x, *kernels, *caches, counter]
    results = [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches]
    results += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    results.append(jax.ShapeDtypeStruct(counter.shape, counter.dtype))
    first = len(given) - 3
    keys, values, streams, *_ = pl.pallas_call(
        partial(layers_kernel, config=config, blocks=blocks),
        out_shape=results,
        grid=(blocks,),
        input_output_aliases={first: 0, first + 1: 1, first + 2: len(results) - 1},
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        name="layers_kernel",
    )(*given)
    return streams[-1], (keys, values)


def _named(references: tuple[Any, ...]) -> tuple[Inputs, Results, Any]:
    """The inputs, the results and the counter, from the references of a launch in their order."""
    plain, parameters = len(Inputs._fields) - 1, len(Kernels._fields)
    inputs = Inputs(*references[:plain], kernels=Kernels(*references[plain : plain + parameters]))
    *results, counter = references[plain + parameters + 3 :]
    return inputs, Results(*results), counter
