"""One token of one text through all layers of a Llama as one GPU kernel, instead of a dozen launches a layer.

A token costs little more than reading the weights once: too little for launches to be hidden behind it. Here every
layer has five phases (`layers_kernel`), in each of which every thread block computes a share, and needs what the others
computed before (`exchange.py`). Weights do not depend on the token: a block loads them into registers ahead of time.

In shapes, L is the layers, H the hidden size, I the intermediate size, Q the query heads, K the heads of keys and
values, D their size (64), and S the splits of attention. Numbers are float32; weights, keys and values are stored in
the model's type.

Written for Pallas's Triton back end. `fused_decoder.py` calls this.
"""

from __future__ import annotations

import math
import operator
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from newllm_jax.smollm.exchange import NOT_WRITTEN, Exchange, exchanges, whole_lines
from newllm_jax.smollm.llama_config import LlamaConfig

HEAD = 64  # the size of a head; every width is a multiple of it
WIDEST_SLICE = 1024  # columns of a matrix that are loaded at a time, at most
MOST_ROWS = 16  # of a matrix that are loaded at a time, at most
POSITIONS = 32  # of keys and values that are loaded at a time; a cache has room for a multiple of it
SPLITS = 8  # into how many parts the positions of a head of keys and values are divided
WARPS = 8  # of a thread block
LARGEST_SHARE = 96 * 1024  # bytes of a layer that a thread block prefetches into its registers at a time
LOWEST = -1e30  # a score that counts as none; with an infinite one, the difference of two would be NaN
SMALLEST = 1e-30  # a sum of exponentials, of a split without positions


class StackedLayers(NamedTuple):
    """The parameters of all layers; the kernels as `[out, in]`, so that a block reads whole rows.

    Attributes:
      attention_norm, mlp_norm: scales `[L, H]`.
      query_key_value: `[L, (Q + 2 K) D, H]`.
      output: `[L, H, Q D]`.
      gate_up: `[L, 2 I, H]`.
      down: `[L, H, I]`.
    """

    attention_norm: Any
    query_key_value: Any
    output: Any
    mlp_norm: Any
    gate_up: Any
    down: Any


class Inputs(NamedTuple):
    """What the kernel reads.

    Attributes:
      position: of the token in its text, `[1]`.
      rotary: cosine and sine of its angles, `[2, D / 2]`.
      x: `[H]`, the residual stream before the first layer.
      layers: the parameters.
    """

    position: Any
    rotary: Any
    x: Any
    layers: StackedLayers


class Exchanges(NamedTuple):
    """What the blocks hand to each other, a vector for each layer.

    Attributes:
      streams: `[H]`, the residual stream after the layer.
      middles: `[H]`, after its attention.
      query_key_value: `[(Q + 2 K) D]`, not turned yet.
      logarithms: `[S, Q]`, of each split of a head log(sum(exp(score))).
      mixes: `[S, Q D]`, the mix of its values, weighted by the softmax of its scores.
      activations: `[I]`, of the feed-forward network.
    """

    streams: Exchange
    middles: Exchange
    query_key_value: Exchange
    logarithms: Exchange
    mixes: Exchange
    activations: Exchange

    @staticmethod
    def sizes(config: LlamaConfig) -> list[int]:
        """Of the vectors, in their order."""
        hidden, heads = config.hidden_size, config.num_heads
        every = (heads + 2 * config.num_kv_heads) * config.head_dim
        return [hidden, hidden, every, SPLITS * heads, SPLITS * heads * config.head_dim, config.intermediate_size]


def slices_of(width: int) -> list[tuple[int, int]]:
    """First column and number of columns of the slices of a row: powers of two, the largest first.

    Triton's arrays have no other sizes. Few large slices also compile faster than many small ones: its compiler takes
    time in proportion to the square of the number of loads.
    """
    slices, first = [], 0
    while first < width:
        size = min(1 << (width - first).bit_length() - 1, WIDEST_SLICE)
        slices.append((first, size))
        first += size
    return slices


def load_slices(vector: Any, *index: Any) -> list[jax.Array]:
    """The last axis of a reference in slices."""
    return [vector[*index, pl.ds(first, size)] for first, size in slices_of(vector.shape[-1])]


def read_slices(vector: Exchange, layer: Any) -> list[jax.Array]:
    """A layer's whole vector in slices."""
    return vector.read(layer, *(first + jax.lax.iota(jnp.int32, size) for first, size in slices_of(vector.size)))


def tile_rows(rows: int, blocks: int) -> tuple[int, int]:
    """Of how many rows each of the tiles of a block are, and how many tiles it has, to share out rows among blocks."""
    share = -(-rows // blocks)
    size = min(1 << (share - 1).bit_length(), MOST_ROWS)
    return size, -(-share // size)


class BlockRows:
    """The rows of a matrix of which a block computes the products with a vector.

    The last blocks may have the same rows as others: they compute the same, and write the same.

    Attributes:
      starts: the first row of each of the block's tiles.
      size: rows of a tile.
    """

    def __init__(self, rows: int, rank: Any, blocks: int) -> None:
        self.size, tiles = tile_rows(rows, blocks)
        self.starts = [jnp.minimum((rank * tiles + tile) * self.size, rows - self.size) for tile in range(tiles)]

    def load(self, matrix: Any, layer: Any, first: int = 0) -> list[list[jax.Array]]:
        """Per tile the slices of its rows of a layer's matrix `[L, out, in]`, whose rows begin with `first`."""
        return [load_slices(matrix, layer, pl.ds(first + start, self.size)) for start in self.starts]

    def write(self, vector: Exchange, layer: Any, parts: list[jax.Array]) -> None:
        """Writes this block's part of a layer's vector, an array for each tile."""
        for start, part in zip(self.starts, parts, strict=True):
            vector.write(layer, start + jax.lax.iota(jnp.int32, self.size), part)


def product(tiles: list[list[jax.Array]], x: list[jax.Array]) -> list[jax.Array]:
    """Per tile the products of its rows with a vector that is given in slices."""

    def of_tile(slices: list[jax.Array]) -> jax.Array:
        sums = [jnp.sum(tile.astype(jnp.float32) * part[None, :], 1) for tile, part in zip(slices, x, strict=True)]
        return reduce(operator.add, sums)

    return [of_tile(slices) for slices in tiles]


def normed(x: list[jax.Array], scale: list[jax.Array], epsilon: float) -> list[jax.Array]:
    """RMSNorm of a vector in slices."""
    mean = sum(jnp.sum(part * part) for part in x) / sum(part.size for part in x)
    inverse = jax.lax.rsqrt(mean + epsilon)
    return [part * inverse * weight for part, weight in zip(x, scale, strict=True)]


def layers_kernel(*references: Any, config: LlamaConfig, blocks: int) -> None:
    """All layers of one token. A layer has five phases:

        1. q, k, v = RMSNorm(x) W_qkv                     a block: its columns
        2. per head of keys and values, and per split of the positions: with the scores s = q k / sqrt(D) of q and k
           turned by their positions,
             logarithm = log(sum(exp(s)));  mix = sum(exp(s - logarithm) v)
           The first split has the new token too, and writes its key and value to the cache.
        3. heads = sum_splits(weight mix) / sum_splits(weight), weight = exp(logarithm - max_splits(logarithm))
           m = x + heads W_o                              a block: all heads, its columns
        4. a = silu(RMSNorm(m) W_gate) * RMSNorm(m) W_up
        5. x' = m + a W_down

    A block waits for the numbers that a phase needs of others, not for the others. Before it waits, it loads the
    weights of the phase after the next one.

    Args:
      references: those of the inputs, of the caches and the exchange that were given, and of the results: the caches
        and the exchange again.
      blocks: of the launch, all of which run at the same time.
    """
    *given, _, _, _, keys, values, reference = references
    plain = len(Inputs._fields) - 1
    inputs = Inputs(*given[:plain], layers=StackedLayers(*given[plain:]))
    exchange = Exchanges(*exchanges(reference, Exchanges.sizes(config)))
    layers, rank = inputs.layers, pl.program_id(0)
    attention = Attention(config, inputs, exchange, keys, values)
    hidden, inner, epsilon = config.hidden_size, config.intermediate_size, config.rms_norm_eps
    of_heads, of_stream, of_inner = (
        BlockRows(rows, rank, blocks) for rows in (exchange.query_key_value.size, hidden, inner)
    )

    def layer(number: Any, carry: Any) -> Any:
        x, own, heads_tiles, scale = carry
        # Phase 1.
        of_heads.write(exchange.query_key_value, number, product(heads_tiles, normed(x, scale, epsilon)))
        output_tiles = of_stream.load(layers.output, number)
        # Phase 2.
        for turn in range(-(-attention.parts // blocks)):
            attention.mix(number, rank + turn * blocks)
        gates, ups = (of_inner.load(layers.gate_up, number, first) for first in (0, inner))
        # Phase 3.
        own = added(own, product(output_tiles, attention.heads(number)))
        of_stream.write(exchange.middles, number, own)
        scale, down_tiles = load_slices(layers.mlp_norm, number), of_stream.load(layers.down, number)
        # Phase 4.
        middle = normed(read_slices(exchange.middles, number), scale, epsilon)
        pairs = zip(product(gates, middle), product(ups, middle), strict=True)
        of_inner.write(exchange.activations, number, [gate / (1.0 + jnp.exp(-gate)) * up for gate, up in pairs])
        prefetched = prefetch(jnp.minimum(number + 1, config.num_layers - 1))  # of the last layer none follows
        # Phase 5.
        own = added(own, product(down_tiles, read_slices(exchange.activations, number)))
        of_stream.write(exchange.streams, number, own)
        return read_slices(exchange.streams, number), own, *prefetched

    def prefetch(number: Any) -> Any:
        """Weights of phase 1."""
        return of_heads.load(layers.query_key_value, number), load_slices(layers.attention_norm, number)

    own = [inputs.x[pl.ds(start, of_stream.size)] for start in of_stream.starts]
    carry = load_slices(inputs.x), own, *prefetch(jnp.int32(0))
    jax.lax.fori_loop(0, config.num_layers, layer, carry)


def added(own: list[jax.Array], found: list[jax.Array]) -> list[jax.Array]:
    """Sums of arrays one by one."""
    return [before + each for before, each in zip(own, found, strict=True)]


class Attention:
    """Phases 2 and 3 of `layers_kernel`.

    Attributes:
      parts: heads of keys and values times splits: what phase 2 shares out among the blocks.
    """

    def __init__(self, config: LlamaConfig, inputs: Inputs, exchange: Exchanges, keys: Any, values: Any) -> None:
        self.config, self.exchange, self.keys, self.values = config, exchange, keys, values
        self.position = inputs.position[0]
        self.shared = config.num_heads // config.num_kv_heads  # query heads of one head of keys and values
        self.group = 1 << (self.shared - 1).bit_length()  # filled up with copies of the last one
        self.parts = config.num_kv_heads * SPLITS
        self.half = config.head_dim // 2
        self.cosine, self.sine = (inputs.rotary[part, :][None, :] for part in range(2))

    def turned(self, one: jax.Array, two: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both halves of some heads `[N, D / 2]`, turned by the token's position."""
        return one * self.cosine - two * self.sine, two * self.cosine + one * self.sine

    def mix(self, layer: Any, part: Any) -> None:
        """Phase 2, of one part."""
        config, exchange = self.config, self.exchange
        head, split = part % config.num_kv_heads, part // config.num_kv_heads

        @pl.when(part < self.parts)
        def _() -> None:
            queries = head * self.shared + jnp.minimum(jax.lax.iota(jnp.int32, self.group), self.shared - 1)
            key = config.num_heads + head + jnp.zeros((1,), jnp.int32)
            value = (config.num_heads + config.num_kv_heads + head) * config.head_dim
            halves = jax.lax.iota(jnp.int32, self.half)[None, :]
            first = [heads[:, None] * config.head_dim + halves for heads in (queries, key)]
            *found, value = exchange.query_key_value.read(
                layer, first[0], first[0] + self.half, first[1], first[1] + self.half,
                value + jax.lax.iota(jnp.int32, config.head_dim),
            )  # fmt: skip
            one, two = (x * config.head_dim**-0.5 for x in self.turned(*found[:2]))
            key_one, key_two = self.turned(*found[2:])
            new, all_heads = split == 0, jnp.zeros((self.group,), jnp.float32)
            largest = jnp.where(new, jnp.sum(one * key_one + two * key_two, 1), LOWEST)
            total = jnp.where(new, all_heads + 1, all_heads)
            mixed = total[:, None] * value[None, :]

            @pl.when(new & (self.position < self.keys.shape[1]))
            def _() -> None:
                places = (layer, self.position, head)
                self.keys[*places, pl.ds(0, self.half)] = jnp.sum(key_one, 0).astype(self.keys.dtype)
                self.keys[*places, pl.ds(self.half, self.half)] = jnp.sum(key_two, 0).astype(self.keys.dtype)
                self.values[*places, :] = value.astype(self.values.dtype)

            def add(step: Any, carry: Any) -> Any:
                largest, total, mixed = carry
                start = (step * SPLITS + split) * POSITIONS
                rows = pl.ds(start, POSITIONS)
                keys = [self.keys[layer, rows, head, pl.ds(k * self.half, self.half)] for k in range(2)]
                products = one[:, None, :] * keys[0].astype(jnp.float32)[None]
                products += two[:, None, :] * keys[1].astype(jnp.float32)[None]
                seen = (start + jax.lax.iota(jnp.int32, POSITIONS) < self.position)[None, :]
                scores = jnp.where(seen, jnp.sum(products, 2), LOWEST)
                larger = jnp.maximum(largest, jnp.max(scores, 1))
                weights, kept = jnp.exp(scores - larger[:, None]), jnp.exp(largest - larger)
                values = self.values[layer, rows, head, :].astype(jnp.float32)
                mixed = mixed * kept[:, None] + jnp.sum(weights[:, :, None] * values[None], 1)
                return larger, total * kept + jnp.sum(weights, 1), mixed

            left = jnp.maximum(self.position - split * POSITIONS, 0)
            stride = SPLITS * POSITIONS
            steps = (left + stride - 1) // stride  # each of them has a position that is seen
            largest, total, mixed = jax.lax.fori_loop(0, steps, add, (largest, total, mixed))
            total = jnp.maximum(total, SMALLEST)
            places = split * config.num_heads + queries
            columns = places[:, None] * config.head_dim + jax.lax.iota(jnp.int32, config.head_dim)[None, :]
            exchange.mixes.write(layer, columns, mixed / total[:, None])
            exchange.logarithms.write(layer, places, largest + jnp.log(total))

    def heads(self, layer: Any) -> list[jax.Array]:
        """The mixes of the values for all query heads, `[Q D]` in slices: the splits together."""
        width, found = self.config.num_heads * self.config.head_dim, []
        splits = jax.lax.iota(jnp.int32, SPLITS)[:, None]
        for first, size in slices_of(width):
            columns = (first + jax.lax.iota(jnp.int32, size))[None, :]
            places = splits * self.config.num_heads + jax.lax.div(columns, jnp.int32(self.config.head_dim))
            logarithms = self.exchange.logarithms.read_spread(layer, places)
            [mixes] = self.exchange.mixes.read(layer, splits * width + columns)
            weights = jnp.exp(logarithms - jnp.max(logarithms, 0)[None, :])
            found.append(jnp.sum(weights * mixes, 0) / jnp.sum(weights, 0))
        return found


def obstacle(config: LlamaConfig, number_bytes: int, blocks: int) -> str:
    """Why the kernel cannot compute a model, whose weights have so many bytes each; "" where it can."""
    hidden, inner = config.hidden_size, config.intermediate_size
    if config.head_dim != HEAD or hidden % HEAD or inner % HEAD:
        return f"head_dim must be {HEAD}, and hidden_size and intermediate_size multiples of that"
    gates_and_ups, down = 2 * math.prod(tile_rows(inner, blocks)) * hidden, math.prod(tile_rows(hidden, blocks)) * inner
    share = max(gates_and_ups, down) * number_bytes
    if share > LARGEST_SHARE:
        return f"a thread block's share of a layer, {share} bytes, does not fit into its registers"
    return ""


def stack_layers(blocks: Any, dtype: Any = jnp.float32) -> StackedLayers:
    """The layers as the kernel reads them, from the parameters of `Backbone`'s blocks.

    Args:
      dtype: of the kernels; scales stay float32.
    """

    def rows(part: str, *names: str) -> jax.Array:
        kernels = [jnp.swapaxes(blocks[part][name]["kernel"], 1, 2) for name in names]
        return jnp.concatenate(kernels, axis=1).astype(dtype)

    return StackedLayers(
        attention_norm=blocks["attention_norm"]["scale"],
        query_key_value=rows("attention", "q_proj", "k_proj", "v_proj"),
        output=rows("attention", "o_proj"),
        mlp_norm=blocks["mlp_norm"]["scale"],
        gate_up=rows("mlp", "gate_proj", "up_proj"),
        down=rows("mlp", "down_proj"),
    )


def run_layers(
    config: LlamaConfig,
    layers: StackedLayers,
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
      position: of the token, a scalar; its keys and values are written there, and it sees those up to it.
      rotary: cosine and sine of its angles, `[2, D / 2]`.
      blocks: thread blocks that the GPU can run at the same time.

    Returns:
      The residual stream `[H]` after the layers, float32, and the caches.
    """
    numbers = sum(map(whole_lines, Exchanges.sizes(config)))
    exchange = jnp.full((config.num_layers, numbers), NOT_WRITTEN, jnp.int32)
    given = [position.reshape(1).astype(jnp.int32), rotary, x, *layers, *caches, exchange]
    aliases = {len(given) - 3 + number: number for number in range(3)}
    keys, values, exchange = pl.pallas_call(
        partial(layers_kernel, config=config, blocks=blocks),
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in given[-3:]],
        grid=(blocks,),
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        name="layers_kernel",
    )(*given)
    last = jax.lax.bitcast_convert_type(exchange[-1, : config.hidden_size], jnp.float32)  # `Exchanges.streams`
    return last, (keys, values)
