"""One token of one text through all layers of a Llama as one GPU kernel, instead of a dozen launches a layer.

A token costs little more than reading the weights once: too little for launches to be hidden behind it. Here every
layer has five phases (`layers_kernel`), between which all thread blocks of the GPU wait for each other. Weights do not
depend on the token: while a block waits, it loads those of a later phase into registers. What is left is the time in
which numbers go from one block to another through device memory, so a phase has as few steps in a row as possible:
warps wait for each other only where they must (`block_rows.py`).

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

from newllm_jax.smollm.block_rows import BlockRows, columns_of, inverse_rms, load_filled, products
from newllm_jax.smollm.kernel_weights import Kernels
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.training.grid_barrier import wait_for_blocks

POSITIONS = 32  # of keys and values that are loaded at a time; a cache has room for a multiple of it
SPLITS = 8  # of the positions of a head of keys and values
WARPS = 8  # of a thread block
LOWEST = -1e30  # a score that counts as none; with an infinite one, the difference of two would be NaN
SMALLEST = 1e-30  # a sum of exponentials, of a split without positions


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
        2. per head of keys and values, and per split of the positions: with the scores s = q k / sqrt(D) of q and k
           turned by their positions,
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
        arrivals, zero, output_tiles = barrier(arrivals, lambda: of_stream.load(kernels.output, number))
        # Phase 2.
        for turn in range(-(-attention.parts // blocks)):
            attention.mix(number, number + zero, rank + turn * blocks)
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
      parts: heads of keys and values times splits: what phase 2 shares out among the blocks.
      opaque_zero: a zero of which the compiler does not know that it is one, see `BlockRows.load`.
    """

    def __init__(self, config: LlamaConfig, inputs: Inputs, results: Results) -> None:
        self.config, self.results, self.position = config, results, inputs.position[0]
        self.shared = config.num_heads // config.num_kv_heads  # query heads of one head of keys and values
        self.group = 1 << (self.shared - 1).bit_length()  # filled up with copies of the last one
        self.parts = config.num_kv_heads * SPLITS
        self.opaque_zero = jnp.minimum(self.position, 0)
        self.columns = jax.lax.iota(jnp.int32, config.head_dim)
        self.cosine, self.sine = (inputs.rotary[part, self.columns][None, :] for part in range(2))

    def mix(self, layer: Any, layer_after_wait: Any, part: Any) -> None:
        """Phase 2, of one part.

        Args:
          layer: its number.
          layer_after_wait: the same, for what other blocks wrote in phase 1: loads with it come after the wait.
        """
        config, results = self.config, self.results
        head, split = part % config.num_kv_heads, part // config.num_kv_heads

        @pl.when(part < self.parts)
        def _() -> None:
            queries = head * self.shared + jnp.minimum(jax.lax.iota(jnp.int32, self.group), self.shared - 1)
            start, capacity = split * POSITIONS, results.keys.shape[1]
            # Splits behind the end of the cache load its last positions, which may be half written, and see none.
            first = self._cached(layer, head, jnp.minimum(start, capacity - POSITIONS))
            query, key, value = self._new_token(layer_after_wait, head, queries)

            @pl.when((self.position // POSITIONS % SPLITS == split) & (self.position < capacity))
            def _() -> None:
                for cache, new in ((results.keys, key), (results.values, value)):
                    cache[layer, self.position, head, self.columns] = jnp.sum(new, 0).astype(cache.dtype)  # one row

            def add(start: Any, tile: Any, carry: Any) -> Any:
                """The positions from `start` on, of which keys and values before the new token are given."""
                largest, total, mixed = carry
                positions = start + jax.lax.iota(jnp.int32, POSITIONS)
                new = (positions == self.position)[None, :, None]
                keys, values = (
                    jnp.where(new, each[:, None, :], cached.astype(jnp.float32))
                    for each, cached in zip((key, value), tile, strict=True)
                )
                seen = (positions <= self.position)[None, :]
                scores = jnp.where(seen, jnp.sum(query[:, None, :] * keys, 2), LOWEST)
                larger = jnp.maximum(largest, jnp.max(scores, 1))
                weights = jnp.where(seen, jnp.exp(scores - larger[:, None]), 0.0)
                kept = jnp.exp(largest - larger)
                mixed = mixed * kept[:, None] + jnp.sum(weights[:, :, None] * values, 1)
                return larger, total * kept + jnp.sum(weights, 1), mixed

            def step(turn: Any, carry: Any) -> Any:
                start = (turn * SPLITS + split) * POSITIONS
                return add(start, self._cached(layer, head, start), carry)

            none = jnp.zeros((self.group,), jnp.float32)
            carry = add(start, first, (none + LOWEST, none, jnp.zeros(query.shape, jnp.float32)))
            seen = jnp.minimum(self.position + 1, capacity)
            stride = SPLITS * POSITIONS
            steps = (jnp.maximum(seen - start, 0) + stride - 1) // stride  # each has a position that is seen
            largest, total, mixed = jax.lax.fori_loop(1, steps, step, carry)
            total = jnp.maximum(total, SMALLEST)[:, None]
            columns = queries[:, None] * config.head_dim + self.columns[None, :]
            results.mixes[layer, split, columns] = mixed / total
            results.logarithms[layer, split, columns] = jnp.broadcast_to(largest[:, None] + jnp.log(total), mixed.shape)

    def _cached(self, layer: Any, head: Any, start: Any) -> list[jax.Array]:
        """Keys and values of `POSITIONS` positions: `[1, POSITIONS, D]`."""
        positions = (start + jax.lax.iota(jnp.int32, POSITIONS))[None, :, None]
        caches = self.results.keys, self.results.values
        columns = self.columns[None, None, :] + 4 * self.opaque_zero  # so that a thread loads 4, also of bfloat16
        return [cache[layer, positions, head, columns] for cache in caches]

    def _new_token(self, layer: Any, head: Any, queries: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, key and value of the token, turned by its position.

        Returns:
          `[group, D]`, `[1, D]` and `[1, D]`.
        """
        config, columns, half = self.config, self.columns[None, :], self.config.head_dim // 2
        other = jnp.where(columns < half, columns + half, columns - half)  # that a number is turned with

        def turned(heads: jax.Array) -> jax.Array:
            one, two = (
                self.results.query_key_value[layer, heads * config.head_dim + each] for each in (columns, other)
            )
            return one * self.cosine + two * self.sine

        key = config.num_heads + head + jnp.zeros((1, 1), jnp.int32)
        value = self.results.query_key_value[layer, (key + config.num_kv_heads) * config.head_dim + columns]
        return turned(queries[:, None]) * config.head_dim**-0.5, turned(key), value

    def heads(self, layer: Any) -> list[jax.Array]:
        """The mixes of the values for all query heads, `[Q D]` in slices `[chunks, 1, CHUNK]`: the splits together."""
        splits, found = jax.lax.iota(jnp.int32, SPLITS)[:, None, None], []
        for columns in columns_of(self.results.mixes.shape[-1]):
            columns = jnp.broadcast_to(columns[None], (SPLITS, *columns.shape))
            logarithms = load_filled(self.results.logarithms, (layer, splits), columns)
            mixes = load_filled(self.results.mixes, (layer, splits), columns)
            weights = jnp.exp(logarithms - jnp.max(logarithms, 0)[None])
            found.append((jnp.sum(weights * mixes, 0) / jnp.sum(weights, 0))[:, None, :])
        return found


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
      caches: keys and values `[L, capacity, K, D]`; the capacity is a multiple of `POSITIONS`.
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
