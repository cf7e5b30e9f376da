"""SmolLM2, and any Llama of its family, in Flax linen.

A decoder of pre-normalised blocks (Llama, Touvron et al. 2023; SmolLM2, Allal et al. 2025): RMSNorm (Zhang and Sennrich
2019), rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al. 2023) and SwiGLU (Shazeer 2020).

    x = x + Attention(RMSNorm(x));  x = x + SwiGLU(RMSNorm(x))      x: the residual stream [B, T, H]

The blocks are one scanned module whose parameters have a leading layer axis: compiling takes the time of one block, and
a range of layers is a slice (`take_layers`). Whatever starts from a residual stream rather than from ids, a stage or a
re-entry at layer n, is a `SmolLM2` with fewer layers, called through `from_hidden`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.linen.initializers import normal

from newllm_jax.config import Precision, check, checked
from newllm_jax.errors import InputError
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.training.arrays import check_array
from newllm_jax.training.precision import PRECISIONS

WEIGHT_STD = 0.02


@struct.dataclass
class KVCache:
    """Keys and values of the tokens so far, rotated as attention uses them, in a buffer of fixed length.

    Attributes:
      keys, values: `[L, B, capacity, kv_heads, head_dim]`.
      length: how many positions are filled, a scalar.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array


@struct.dataclass
class HiddenStates:
    """The results of one pass over the blocks, each `[B, T, H]`.

    Attributes:
      embedding: what went into the first block.
      residual: the residual stream after the last block, before the final norm.
      last: the last hidden state, after the final norm; the head turns it into logits.
      at_depths: `[depths, B, T, H]`, the residual stream after each of the requested depths.
      cache: the cache with this piece's keys and values added; None where none was given.
    """

    embedding: jax.Array
    residual: jax.Array
    last: jax.Array
    at_depths: jax.Array
    cache: KVCache | None


@struct.dataclass
class Route:
    """Which tokens the layers of a pass change; the residual stream of the others is held.

    With x_l the stream before layer l, x_(l+1) is `layer_l(x_l)` where a token is active, else `held_l`. A layer makes
    keys and values of x_l for all tokens, so an active token also sees those that were held.

    Attributes:
      active: `[L, B, T]` bool.
      held: `[L, B, T, H]`, the stream of a held token after each layer; None: what it was before the layer.
    """

    active: jax.Array
    held: jax.Array | None = None


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, then a learned scale."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.epsilon)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x [..., H]` divided by its root mean square, times `scale [H]`."""
    wide = x.astype(jnp.float32)  # the mean of squares loses too much in half precision
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype)


def rotary_embedding(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[T, head_dim / 2]` of each position's angle in each of the planes of a head."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns `x [B, T, heads, head_dim]` by its positions; a plane of a head is (i, i + head_dim / 2)."""
    cosine, sine = (part[:, None, :].astype(x.dtype) for part in rotary)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


class Attention(nn.Module):
    """Causal self-attention in which `num_heads / num_kv_heads` query heads share a key and value head."""

    config: LlamaConfig
    precision: Precision = "fp32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        cached: tuple[jax.Array, jax.Array] | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """`x [B, T, H]` -> the same shape, and the layer's cache.

        `mask [T, keys]` is true where a key is seen. `cached` holds the layer's keys and values `[B, capacity,
        kv_heads, head_dim]`; those of x are written from `start` on.
        """
        config, (batch, time, _) = self.config, x.shape

        def heads(count: int, name: str) -> jax.Array:
            projected = _dense(count * config.head_dim, x.dtype, self.precision, name)(x)
            return projected.reshape(batch, time, count, config.head_dim)

        query = rotate(heads(config.num_heads, "q_proj"), rotary)
        key = rotate(heads(config.num_kv_heads, "k_proj"), rotary)
        value = heads(config.num_kv_heads, "v_proj")
        if cached is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cached[0], key.astype(cached[0].dtype), start, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cached[1], value.astype(cached[1].dtype), start, axis=1)
            cached = key, value
        query = query.reshape(batch, time, config.num_kv_heads, -1, config.head_dim)  # k: kv head, g: query head of it
        scores = jnp.einsum(
            "btkgd,bskd->bkgts", query, key, precision=PRECISIONS[self.precision], preferred_element_type=jnp.float32
        )
        weights = nn.softmax(jnp.where(mask, scores * config.head_dim**-0.5, -jnp.inf), axis=-1)  # float32
        mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(x.dtype), value, precision=PRECISIONS[self.precision])
        mixed = mixed.reshape(batch, time, -1)
        return _dense(config.hidden_size, x.dtype, self.precision, "o_proj")(mixed), cached


class SwiGLU(nn.Module):
    """The gated feed-forward part: `down(silu(gate(x)) * up(x))`."""

    config: LlamaConfig
    precision: Precision = "fp32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = _dense(self.config.intermediate_size, x.dtype, self.precision, "gate_proj")(x)
        up = _dense(self.config.intermediate_size, x.dtype, self.precision, "up_proj")(x)
        return _dense(self.config.hidden_size, x.dtype, self.precision, "down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each reading a normalised residual stream and adding to it."""

    config: LlamaConfig
    precision: Precision = "fp32"

    @nn.compact
    def __call__(self, x: jax.Array, rotary: Any, mask: jax.Array, cached: Any = None, start: Any = 0) -> Any:
        """Arguments and results of `Attention`."""
        epsilon = self.config.rms_norm_eps
        normed = RMSNorm(epsilon, name="attention_norm")(x)
        mixed, cached = Attention(self.config, self.precision, name="attention")(normed, rotary, mask, cached, start)
        x = x + mixed
        return x + SwiGLU(self.config, self.precision, name="mlp")(RMSNorm(epsilon, name="mlp_norm")(x)), cached


class _ScannedBlock(nn.Module):
    """A block as a step of the scan over layers: it also keeps the residual stream where a depth was asked for."""

    config: LlamaConfig
    precision: Precision

    def setup(self) -> None:
        self.block = Block(self.config, self.precision)
        nn.share_scope(self, self.block)  # the parameters are those of one Block, with a layer axis in front

    def __call__(
        self, carry: Any, slot: jax.Array, route: Route | None, cached: Any, rotary: Any, mask: jax.Array, start: Any
    ) -> Any:  # fmt: skip
        before, saved = carry
        x, cached = self.block(before, rotary, mask, cached, start)
        if route is not None:
            x = jnp.where(route.active[..., None], x, before if route.held is None else route.held)
        saved = saved.at[slot].set(x, mode="drop") if saved.shape[0] else saved
        return (x, saved), cached


class Backbone(nn.Module):
    """The blocks and the final norm: a residual stream in, hidden states out. Knows neither ids nor logits."""

    config: LlamaConfig
    precision: Precision = "fp32"
    recompute: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: KVCache | None = None, depths: tuple[int, ...] = (), route: Route | None = None
    ) -> HiddenStates:
        """Runs all layers over a piece of text; in pieces with a cache, or whole without: the same numbers.

        Args:
          x: `[B, T, H]`, the residual stream before the first layer.
          cache: keys and values of earlier pieces; x stands at positions `cache.length` and after, without it at 0 and
            after.
          depths: rising numbers of layers (0: x itself) after which the residual stream is saved.
          route: which tokens each layer changes; None: all.

        A piece that does not fit into the cache gives NaN, never a wrong number.
        """
        layers, time = self.config.num_layers, x.shape[1]
        if any(not 0 <= depth <= layers for depth in depths) or list(depths) != sorted(set(depths)):
            raise InputError(f"depths: must be rising numbers from 0 to {layers}, not {depths}")
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        positions = start + jnp.arange(time)
        seen = jnp.arange(time if cache is None else cache.keys.shape[2])  # a slot of the cache is a position
        mask = seen <= positions[:, None]
        rotary = rotary_embedding(positions, self.config.head_dim, self.config.rope_theta)
        slots = [depths.index(layer + 1) if layer + 1 in depths else len(depths) for layer in range(layers)]
        saved = jnp.zeros((len(depths), *x.shape), x.dtype)
        axes: Any = (
            0,
            0,
            0,
            nn.broadcast,
            nn.broadcast,
            nn.broadcast,
        )  # slots, route, caches by layer; the rest the same
        block = nn.remat(_ScannedBlock, prevent_cse=False) if self.recompute else _ScannedBlock
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=axes, length=layers)
        cached = None if cache is None else (cache.keys, cache.values)
        (residual, saved), cached = scan(self.config, self.precision, name="blocks")(
            (x, saved.at[0].set(x) if 0 in depths else saved), jnp.asarray(slots), route, cached, rotary, mask, start
        )
        if cache is not None:
            residual = jnp.where(start + time <= seen.shape[0], residual, jnp.nan)
            cache = KVCache(*cached, length=start + time)
        last = RMSNorm(self.config.rms_norm_eps, name="norm")(residual)
        return HiddenStates(x, residual, last, saved, cache)


class SmolLM2(nn.Module):
    """The language model: embedding, backbone, and a head that is tied to the embedding unless the config says not.

    Parameters are float32; `dtype` is that of the computation, in which norms and softmax stay float32.

    Attributes:
      config: the architecture.
      precision: of every matrix product; fp32 is strict float32 on every device.
      dtype: of activations.
      recompute: whether a layer's activations are computed again in the backward pass, from its input, instead of
        stored: less memory, a third more work, the same numbers.
    """

    config: LlamaConfig
    precision: Precision = "fp32"
    dtype: Any = jnp.float32
    recompute: bool = False

    def setup(self) -> None:
        config = self.config
        check("config", config, "a LlamaConfig", isinstance(config, LlamaConfig))
        checked("precision", self.precision, Precision)
        table = {"dtype": self.dtype, "embedding_init": normal(WEIGHT_STD)}
        self.embed = nn.Embed(config.vocab_size, config.hidden_size, **table)
        self.backbone = Backbone(config, self.precision, self.recompute)
        if not config.tie_embeddings:
            self.lm_head = _dense(config.vocab_size, self.dtype, self.precision, None)

    def __call__(self, ids: jax.Array, cache: KVCache | None = None) -> tuple[jax.Array, KVCache | None]:
        """`ids [B, T]` -> logits `[B, T, V]` of the id after each, and the cache."""
        states = self.hidden(ids, cache)
        return self.logits(states.last), states.cache

    def hidden(self, ids: jax.Array, cache: KVCache | None = None, depths: tuple[int, ...] = ()) -> HiddenStates:
        """`ids [B, T]` -> hidden states; see `Backbone`."""
        check_array("ids", ids, "integers", "B", "T")
        return self.from_hidden(self.embed(ids), cache, depths)

    def from_hidden(
        self, x: jax.Array, cache: KVCache | None = None, depths: tuple[int, ...] = (), route: Route | None = None
    ) -> HiddenStates:
        """Runs the layers on a residual stream `x [B, T, H]` instead of on embedded ids; see `Backbone`."""
        check_array("x", x, "numbers", "B", "T", self.config.hidden_size)
        check("cache", cache, "a KVCache or None", cache is None or isinstance(cache, KVCache))
        if self.is_initializing():
            self.logits(self.embed(jnp.zeros((1, 1), jnp.int32)))  # ids or no ids: the same parameters
        return self.backbone(x.astype(self.dtype), cache, depths, route)

    def logits(self, last: jax.Array) -> jax.Array:
        """The head: last hidden states `[..., H]` -> float32 logits `[..., V]`."""
        check_array("last", last, "numbers", "...", self.config.hidden_size)
        if not self.config.tie_embeddings:
            return self.lm_head(last.astype(self.dtype)).astype(jnp.float32)
        last, table = last.astype(self.dtype), self.embed.embedding.astype(self.dtype)
        return jnp.einsum(
            "...h,vh->...v", last, table, precision=PRECISIONS[self.precision], preferred_element_type=jnp.float32
        )


def empty_cache(config: LlamaConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> KVCache:
    """A cache for `capacity` tokens of each of `batch` texts, as yet with none."""
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def take_layers(config: LlamaConfig, params: Any, first: int, stop: int) -> tuple[LlamaConfig, Any]:
    """Layers `first` to `stop` (exclusive) of a model, with its embedding, final norm and head, as a smaller model.

    Called through `from_hidden` on the residual stream at depth `first`, it re-enters the model there.
    """
    if not 0 <= first < stop <= config.num_layers:
        raise ValueError(f"layers {first} to {stop} of {config.num_layers}")
    blocks = jax.tree.map(lambda stacked: stacked[first:stop], params["backbone"]["blocks"])
    smaller = dataclasses.replace(config, num_layers=stop - first)
    return smaller, {**params, "backbone": {**params["backbone"], "blocks": blocks}}


def parameter_shapes(config: LlamaConfig) -> Any:
    """The parameter tree as shapes and types: nothing is computed, whatever the size."""
    init = SmolLM2(config).init
    return jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


def _dense(features: int, dtype: Any, precision: Precision, name: str | None) -> nn.Dense:
    return nn.Dense(features, False, dtype, precision=PRECISIONS[precision], kernel_init=normal(WEIGHT_STD), name=name)
