"""One token of one text through all layers of a Llama as one GPU kernel, instead of a dozen launches a layer.

A token costs little more than reading the weights once: too little for launches to be hidden behind it. Here every
layer has five phases (`layers_kernel`), between which all thread blocks of the GPU wait for each other. Weights do not
depend on the token: while a block waits, it loads those of its next phase into registers.

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

from newllm_jax.smollm.block_rows import BlockRows, load_slices, normed, product, slices_of
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.token_step import Layer, stacked_layers
from newllm_jax.training.grid_barrier import wait_for_blocks

POSITIONS = 32  # of keys and values that are loaded at a time; a cache has room for a multiple of it
SPLITS = 8  # of the positions of a head of keys and values; a multiple of 8, so that layers share no sector of a cache
WARPS = 8  # of a thread block
LOWEST = -1e30  # a score that counts as none


class Inputs(NamedTuple):
    """What the kernel reads.

    Attributes:
      position: of the token in its text, `[1]`.
      rotary: cosine and sine of its angles, `[2, D / 2]`.
      x: `[H]`, the residual stream before the first layer.
      layers: the parameters, see `transposed_layers`.
    """

    position: Any
    rotary: Any
    x: Any
    layers: Layer


class Results(NamedTuple):
    """What the kernel writes; all but the first three are scratch.

    Attributes:
      keys, values: `[L, capacity, K, D]`, those of the positions before; at this position the kernel writes.
      streams: `[L, H]`, the residual stream after each layer.
      middles: `[L, H]`, after the attention of each.
      query_key_value: `[L, (Q + 2 K) D]`, not turned yet.
      maxima, sums: `[L, S, Q]`, of each split of a head the largest score, and the sum of exp(score - largest).
      mixes: `[L, S, Q D]`, the sum of exp(score - largest) * value.
      activations: `[L, I]`, of the feed-forward network.
    """

    keys: Any
    values: Any
    streams: Any
    middles: Any
    query_key_value: Any
    maxima: Any
    sums: Any
    mixes: Any
    activations: Any


def layers_kernel(*references: Any, config: LlamaConfig, blocks: int) -> None:
    """All layers of one token. Layer l has five phases; each ends with a barrier of all blocks.

        1. q, k, v = RMSNorm(x) W_qkv                     a block: its columns
        2. per head of keys and values, and per split of the positions: with the scores s = q k / sqrt(D) of q and k
           turned by their positions,
             largest = max(s);  sum = sum(exp(s - largest));  mix = sum(exp(s - largest) v)
           The first split has the new token too, and writes its key and value to the cache.
        3. head = sum_splits(exp(largest - max(largest)) mix) / sum_splits(exp(largest - max(largest)) sum)
           m = x + heads W_o                              a block: all heads, its columns
        4. a = silu(RMSNorm(m) W_gate) * RMSNorm(m) W_up
        5. x' = m + a W_down

    Args:
      references: those of the inputs, of the caches and counters that were given, and of the results and the counter.
      blocks: of the launch, all of which run at the same time.
    """
    inputs, results, counter = _named(references)
    layers, rank = inputs.layers, pl.program_id(0)
    attention = Attention(config, inputs, results)
    hidden, inner = config.hidden_size, config.intermediate_size
    all_heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    of_heads, of_stream, of_inner = (BlockRows(rows, rank, blocks) for rows in (all_heads, hidden, inner))
    barrier = partial(wait_for_blocks, counter, 0, blocks)

    def layer(number: Any, carry: Any) -> Any:
        arrivals, x, own, (tiles, scale) = carry
        # Phase 1.
        of_heads.store(results.query_key_value, number, product(tiles, normed(x, scale, config.rms_norm_eps)))
        arrivals, zero, _ = barrier(arrivals)
        # Phase 2.
        for turn in range(-(-attention.parts // blocks)):
            attention.mix(number, number + zero, rank + turn * blocks)
        arrivals, zero, tiles = barrier(arrivals, lambda: of_stream.load(layers.output, number))
        # Phase 3.
        found = product(tiles, attention.heads(number + zero))
        own = [before + added for before, added in zip(own, found, strict=True)]
        of_stream.store(results.middles, number, own)
        arrivals, zero, (gates, ups, scale) = barrier(arrivals, lambda: (
            of_inner.load(layers.gate_up, number), of_inner.load(layers.gate_up, number, inner),
            load_slices(layers.mlp_norm, number),
        ))  # fmt: skip
        # Phase 4.
        middle = normed(load_slices(results.middles, number + zero), scale, config.rms_norm_eps)
        found = zip(product(gates, middle), product(ups, middle), strict=True)
        of_inner.store(results.activations, number, [gate / (1.0 + jnp.exp(-gate)) * up for gate, up in found])
        arrivals, zero, tiles = barrier(arrivals, lambda: of_stream.load(layers.down, number))
        # Phase 5.
        found = product(tiles, load_slices(results.activations, number + zero))
        own = [before + added for before, added in zip(own, found, strict=True)]
        of_stream.store(results.streams, number, own)
        following = jnp.minimum(number + 1, config.num_layers - 1)  # of the last layer none follows
        arrivals, zero, prefetched = barrier(arrivals, lambda: prefetch(following))
        return arrivals, load_slices(results.streams, number + zero), own, prefetched

    def prefetch(number: Any) -> Any:
        """Inputs of phase 1."""
        return of_heads.load(layers.query_key_value, number), load_slices(layers.attention_norm, number)

    own = [inputs.x[pl.ds(start, of_stream.size)] for start in of_stream.starts]
    carry = jnp.int32(0), load_slices(inputs.x), own, prefetch(jnp.int32(0))
    jax.lax.fori_loop(0, config.num_layers, layer, carry)


class Attention:
    """Phases 2 and 3 of `layers_kernel`.

    Attributes:
      parts: heads of keys and values times splits: what phase 2 shares out among the blocks.
    """

    def __init__(self, config: LlamaConfig, inputs: Inputs, results: Results) -> None:
        self.config, self.results, self.position = config, results, inputs.position[0]
        self.cached = jnp.minimum(self.position, results.keys.shape[1])  # positions before, none outside the cache
        self.shared = config.num_heads // config.num_kv_heads  # query heads of one head of keys and values
        self.group = 1 << (self.shared - 1).bit_length()  # filled up with copies of the last one
        self.parts = config.num_kv_heads * SPLITS
        self.half = config.head_dim // 2
        self.cosine, self.sine = (inputs.rotary[part, :][None, :] for part in range(2))

    def turned(self, layer: Any, heads: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Some heads `[N]` of queries or keys, turned by the token's position: both halves, `[N, D / 2]`."""
        first = heads[:, None] * self.config.head_dim + jax.lax.iota(jnp.int32, self.half)[None, :]
        one, two = (self.results.query_key_value[layer, places] for places in (first, first + self.half))
        return one * self.cosine - two * self.sine, two * self.cosine + one * self.sine

    def mix(self, number: Any, layer: Any, part: Any) -> None:
        """Phase 2, of one part.

        Args:
          number: of the layer.
          layer: the same, for what other blocks wrote in phase 1: loads with it come after the wait.
        """
        config, results = self.config, self.results
        head, split = part % config.num_kv_heads, part // config.num_kv_heads

        @pl.when(part < self.parts)
        def _() -> None:
            queries = head * self.shared + jnp.minimum(jax.lax.iota(jnp.int32, self.group), self.shared - 1)
            one, two = (x * config.head_dim**-0.5 for x in self.turned(layer, queries))
            key_head = jnp.full((1,), config.num_heads, jnp.int32) + head
            key_one, key_two = self.turned(layer, key_head)
            value_place = (config.num_heads + config.num_kv_heads + head) * config.head_dim
            value = results.query_key_value[layer, pl.ds(value_place, config.head_dim)]
            new, all_heads = split == 0, jnp.zeros((self.group,), jnp.float32)
            largest = jnp.where(new, jnp.sum(one * key_one + two * key_two, 1), LOWEST)
            total = jnp.where(new, all_heads + 1, all_heads)
            mixed = total[:, None] * value[None, :]

            @pl.when(new & (self.position < results.keys.shape[1]))
            def _() -> None:
                places = (number, self.position, head)
                results.keys[*places, pl.ds(0, self.half)] = jnp.sum(key_one, 0).astype(results.keys.dtype)
                results.keys[*places, pl.ds(self.half, self.half)] = jnp.sum(key_two, 0).astype(results.keys.dtype)
                results.values[*places, :] = value.astype(results.values.dtype)

            def add(step: Any, carry: Any) -> Any:
                largest, total, mixed = carry
                start = (step * SPLITS + split) * POSITIONS
                rows = pl.ds(start, POSITIONS)
                keys = [results.keys[number, rows, head, pl.ds(k * self.half, self.half)] for k in range(2)]
                products = one[:, None, :] * keys[0].astype(jnp.float32)[None]
                products += two[:, None, :] * keys[1].astype(jnp.float32)[None]
                seen = (start + jax.lax.iota(jnp.int32, POSITIONS) < self.cached)[None, :]
                scores = jnp.where(seen, jnp.sum(products, 2), LOWEST)
                larger = jnp.maximum(largest, jnp.max(scores, 1))
                weights, kept = jnp.exp(scores - larger[:, None]), jnp.exp(largest - larger)
                values = results.values[number, rows, head, :].astype(jnp.float32)
                mixed = mixed * kept[:, None] + jnp.sum(weights[:, :, None] * values[None], 1)
                return larger, total * kept + jnp.sum(weights, 1), mixed

            left = jnp.maximum(self.cached - split * POSITIONS, 0)
            stride = SPLITS * POSITIONS
            steps = (left + stride - 1) // stride  # each of them has a position that is seen
            largest, total, mixed = jax.lax.fori_loop(0, steps, add, (largest, total, mixed))
            results.maxima[number, split, queries] = largest
            results.sums[number, split, queries] = total
            places = queries[:, None] * config.head_dim + jax.lax.iota(jnp.int32, config.head_dim)[None, :]
            results.mixes[number, split, places] = mixed

    def heads(self, layer: Any) -> list[jax.Array]:
        """The mixes of the values for all query heads, `[Q D]` in slices: the splits together."""
        results, splits, found = self.results, jax.lax.iota(jnp.int32, SPLITS)[:, None], []
        for first, size in slices_of(results.mixes.shape[-1]):
            columns = first + jax.lax.iota(jnp.int32, size)
            heads = jax.lax.div(columns, jnp.int32(self.config.head_dim))[None, :]
            maxima = results.maxima[layer, splits, heads]
            weights = jnp.exp(maxima - jnp.max(maxima, 0)[None, :])
            total = jnp.sum(weights * results.sums[layer, splits, heads], 0)
            found.append(jnp.sum(weights * results.mixes[layer, :, pl.ds(first, size)], 0) / total)
        return found


def transposed_layers(blocks: Any, dtype: Any = jnp.float32) -> Layer:
    """`stacked_layers` as the kernel reads them: its kernels are `[L, out, in]`, so that a block reads whole rows."""
    leaves = stacked_layers(blocks, dtype)
    return Layer(*(jnp.swapaxes(leaf, 1, 2) if leaf.ndim == 3 else leaf for leaf in leaves))


def run_layers(
    config: LlamaConfig,
    layers: Layer,
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
    count, heads = config.num_layers, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    splits = count, SPLITS, config.num_heads
    shapes = [(count, config.hidden_size)] * 2 + [
        (count, heads), splits, splits, (count, SPLITS, config.num_heads * config.head_dim),
        (count, config.intermediate_size),
    ]  # fmt: skip
    counter = jnp.zeros((1,), jnp.int32)
    given = [position.reshape(1).astype(jnp.int32), rotary, x, *layers, *caches, counter]
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
    plain, parameters = len(Inputs._fields) - 1, len(Layer._fields)
    inputs = Inputs(*references[:plain], layers=Layer(*references[plain : plain + parameters]))
    *results, counter = references[plain + parameters + 3 :]
    return inputs, Results(*results), counter
