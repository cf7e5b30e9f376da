"""SmolLM2 as the loop of `decoding.loop` uses it: a prompt read in pieces by one program, then token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from newllm_jax.smollm.model import KVCache, SmolLM2, empty_cache, rms_norm
from newllm_jax.smollm.token_step import (
    LayerCache,
    multiply,
    multiply_rows,
    run_layers,
    stored_kernel,
    unstack_caches,
    unstack_layers,
)
from newllm_jax.training.step import Params

PROMPT_PIECE = 256  # tokens; longer prompts are read piece by piece, so that attention's scores stay small


class TokenWeights(NamedTuple):
    """The parameters of a SmolLM2 for one token at a time, in the model's type but for the scales of norms.

    Attributes:
      embedding: `[V, H]`.
      layers: one by one, each a `Layer`; of a `FusedDecoder` all as one, see `kernel_weights.Kernels`.
      norm: `[H]`, the scale of the final norm.
      head: `[H, V]` as `stored_kernel` stores it; None where the embedding is the head.
    """

    embedding: jax.Array
    layers: Any
    norm: jax.Array
    head: jax.Array | None


class TokenCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      layers: of each layer.
      length: how many positions are filled, a scalar. What lies behind them is never seen, and overwritten.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array


class TokenStates(NamedTuple):
    """What the model makes of a token of each text.

    Attributes:
      embedding, last: its embedding and last hidden state, `[B, H]`.
      logits: `[B, V]`, float32.
    """

    embedding: jax.Array
    last: jax.Array
    logits: jax.Array


@dataclass(frozen=True)
class BaseDecoder:
    """A SmolLM2 in which every token passes all layers: one exit."""

    model: SmolLM2

    exits = 1

    def prepare(self, params: Params) -> TokenWeights:
        """The model's parameters as `token_states` reads them."""
        return token_weights(self.model, params)

    def start(self, params: Params, ids: jax.Array, length: jax.Array, capacity: int) -> TokenCache:
        """The cache after the first `length` of `ids [B, T]`."""
        return read_prompt(self.model, params, ids, length, capacity)

    def step(
        self, weights: TokenWeights, cache: TokenCache, tokens: jax.Array
    ) -> tuple[TokenCache, jax.Array, jax.Array]:
        """The cache with `tokens [B]`, logits `[B, V]`, and exits `[B]`, all 0."""
        cache, states = token_states(self.model, weights, cache, tokens)
        return cache, states.logits, jnp.zeros(len(tokens), jnp.int32)


def read_prompt(model: SmolLM2, params: Params, ids: jax.Array, length: jax.Array, capacity: int) -> TokenCache:
    """The cache, with room for `capacity` tokens, after the first `length` of `ids [B, T]`; the others are padding."""
    cache = prompt_cache(model, params, ids, capacity)
    return TokenCache(unstack_caches(cache.keys, cache.values), length)


def prompt_cache(model: SmolLM2, params: Params, ids: jax.Array, capacity: int) -> KVCache:
    """The keys and values of all layers of `ids [B, T]`.

    What pads a prompt is read too, but a token sees none that come after it, and those that are generated overwrite it.
    """
    batch, time = ids.shape
    piece = PROMPT_PIECE if time % PROMPT_PIECE == 0 else time

    def read(cache: KVCache, ids: jax.Array) -> tuple[KVCache, None]:
        states: Any = model.apply({"params": params}, ids, cache, method="hidden")
        return states.cache, None

    pieces = ids.reshape(batch, -1, piece).swapaxes(0, 1)
    return jax.lax.scan(read, empty_cache(model.config, batch, capacity, model.dtype), pieces)[0]


def token_weights(model: SmolLM2, params: Params, layers: Any = None) -> TokenWeights:
    """The parameters of the model.

    Args:
      layers: in another form; None for one by one.
    """
    backbone: Any = params["backbone"]
    head = None if model.config.tie_embeddings else stored_kernel(params["lm_head"]["kernel"].astype(model.dtype))
    return TokenWeights(
        embedding=params["embed"]["embedding"].astype(model.dtype),
        layers=unstack_layers(backbone["blocks"], model.dtype) if layers is None else layers,
        norm=backbone["norm"]["scale"],
        head=head,
    )


def token_states(
    model: SmolLM2, weights: TokenWeights, cache: TokenCache, tokens: jax.Array
) -> tuple[TokenCache, TokenStates]:
    """Reads the next token of each text, `tokens [B]`, through all layers.

    A token that does not fit into the cache gives NaN, never a wrong number.
    """
    config, precision, position = model.config, model.precision, cache.length
    embedding = jnp.take(weights.embedding, tokens, axis=0)
    residual, layers = run_layers(config, precision, weights.layers, cache.layers, embedding, position)
    residual = jnp.where(position < layers[0][0].shape[1], residual, jnp.nan)
    last = rms_norm(residual, weights.norm, config.rms_norm_eps)
    return TokenCache(layers, position + 1), TokenStates(embedding, last, token_logits(model, weights, last))


def token_logits(model: SmolLM2, weights: TokenWeights, last: jax.Array) -> jax.Array:
    """The head: last hidden states `[B, H]` -> float32 logits `[B, V]`."""
    if weights.head is None:
        return multiply_rows(last, weights.embedding, model.precision)
    return multiply(last, weights.head, model.precision).astype(jnp.float32)
