"""The loop that makes text on the device: a few tokens of each text a call, chosen and fed back without the host.

It knows no model, only a `Decoder`: what reads a prompt, and what says after each token which could come next and where
that prediction was made. In shapes, B is the texts, T the ids of a prompt with what pads it, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.decoding.sampling import Sampling, sample

SHORTEST_PROMPT = 32  # prompts are padded to powers of two of at least this, so that they share compiled programs
# A text starts with the first call, and the host reads one while the device is at the next. A call costs a CPU nothing
# beside a token, and its tokens are slow enough to be shown one by one.
TOKENS_PER_CALL, TOKENS_PER_CPU_CALL = 8, 1
GPU_OPTIONS: dict[str, Any] = {}  # of XLA's compiler, for the loop on GPUs
NO_EXIT = -1
NO_END = -1  # an id that is never chosen


class Decoder(Protocol):
    """A model as the loop uses it. Hashable, and equal where it computes the same: programs are compiled for each.

    Attributes:
      exits: the number of places at which a token can exit.
    """

    @property
    def exits(self) -> int: ...

    def prepare(self, params: Any) -> Any:
        """The parameters as `step` wants them; once for a text, compiled."""
        ...

    def start(self, params: Any, ids: jax.Array, length: jax.Array, capacity: int) -> Any:
        """Reads the beginning of a prompt; compiled.

        Args:
          params: as `prepare` gets them.
          ids: `[B, T]`, of which the first `length` (0 to T) count and the rest is padding.
          capacity: how many tokens the cache has room for, at least T.

        Returns:
          The cache after `length` tokens, a tree of arrays.
        """
        ...

    def step(self, weights: Any, cache: Any, tokens: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """Reads the next token of each text.

        Args:
          weights: what `prepare` gave.
          tokens: `[B]`.

        Returns:
          The cache after them, the logits `[B, V]` of what follows each, and where each exited, `[B]` int32 from 0.
        """
        ...


class Texts(NamedTuple):
    """Texts in the making, on the device.

    Attributes:
      cache: the decoder's.
      tokens: `[B]`, the last token of each, which the decoder has not read yet.
      ended: `[B]`, which of them have come to their end.
      position: how many tokens were chosen so far, a scalar.
    """

    cache: Any
    tokens: jax.Array
    ended: jax.Array
    position: jax.Array


def generated_tokens(
    decoder: Decoder,
    params: Any,
    prompts: np.ndarray,
    count: int,
    capacity: int,
    sampling: Sampling,
    keys: jax.Array,
    end: int | None = None,
    per_call: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Streams the tokens that follow some prompts of one length, a few of each at a time.

    Args:
      prompts: ids `[B, length]`, at least one each.
      count: tokens of each text, at most.
      capacity: how many tokens the cache has room for, prompts included.
      keys: `[B]`, a text's own; the token at a position after the prompt is drawn with `fold_in(key, position)`.
      end: the id that ends a text.
      per_call: tokens of each text that a call makes, None for this device's number; the tokens do not depend on it.

    Yields:
      Ids and where each exited, both `[B, n]`, in order; `count` in all, or fewer where all texts have ended before.
      What follows a text's end is `end`, with `NO_EXIT`.
    """
    length = prompts.shape[1]
    if not 0 < length <= length + count <= capacity:
        raise ValueError(f"a prompt of {length} tokens and {count} more do not fit into a cache for {capacity}")
    padded = np.zeros((len(prompts), padded_length(length - 1, capacity)), np.int32)
    padded[:, : length - 1] = prompts[:, :-1]
    params = jax.device_put(params)
    texts = Texts(
        cache=_start(decoder, params, padded, length - 1, capacity),
        tokens=jnp.asarray(prompts[:, -1], jnp.int32),
        ended=jnp.zeros(len(prompts), bool),
        position=jnp.zeros((), jnp.int32),
    )
    weights = _prepare(decoder, params)
    del params
    platform, end = jax.devices()[0].platform, NO_END if end is None else end
    per_call = per_call or (TOKENS_PER_CPU_CALL if platform == "cpu" else TOKENS_PER_CALL)
    waiting: list[tuple[int, list[jax.Array]]] = []
    for first in range(0, count, per_call):
        texts, *made = compiled_calls(platform)(decoder, sampling, per_call, end, weights, texts, keys)
        waiting.append((first, made))
        if len(waiting) > 1:  # the device is at the next call by now
            ids, exits = _fetch(waiting.pop(0), count)
            yield ids, exits
            if (ids[:, -1] == end).all():
                return
    for call in waiting:
        yield _fetch(call, count)


def padded_length(length: int, capacity: int) -> int:
    """The length to which a prompt is padded: a power of two of at least `SHORTEST_PROMPT`, at most the capacity."""
    return min(max(SHORTEST_PROMPT, 1 << max(length - 1, 0).bit_length()), capacity)


def _fetch(call: tuple[int, list[jax.Array]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and exits `[B, n]` of a call, which began with token `first`, without those past `count`."""
    first, made = call
    ids, exits = (np.asarray(each)[: count - first].T for each in jax.device_get(made))
    return ids, exits


@partial(jax.jit, static_argnums=(0, 4))
def _start(decoder: Decoder, params: Any, ids: jax.Array, length: jax.Array, capacity: int) -> Any:
    return decoder.start(params, ids, jnp.asarray(length, jnp.int32), capacity)


@partial(jax.jit, static_argnums=0)
def _prepare(decoder: Decoder, params: Any) -> Any:
    return decoder.prepare(params)


@cache
def compiled_calls(platform: str) -> Any:
    """`next_tokens`, compiled for a platform (`cpu`, `gpu`); the texts given to it are used up."""
    options = GPU_OPTIONS if platform == "gpu" else {}
    return jax.jit(next_tokens, static_argnums=(0, 1, 2, 3), donate_argnums=5, compiler_options=options or None)


def next_tokens(
    decoder: Decoder, sampling: Sampling, count: int, end: int, weights: Any, texts: Texts, keys: jax.Array
) -> tuple[Texts, jax.Array, jax.Array]:
    """The next `count` tokens of each text.

    The number of steps is fixed, for a loop that ends by a condition would ask the host after each of them. A text that
    has ended goes on with `end`, and what the decoder makes of that is dropped.

    Args:
      keys: `[B]`.

    Returns:
      The texts; ids and exits, both `[count, B]`.
    """

    def draw(logits: jax.Array, key: jax.Array, position: jax.Array) -> jax.Array:
        return sample(logits, sampling, jax.random.fold_in(key, position))

    def step(texts: Texts, _: None) -> tuple[Texts, tuple[jax.Array, jax.Array]]:
        cache, logits, exits = decoder.step(weights, texts.cache, texts.tokens)
        chosen = jax.vmap(draw, (0, 0, None))(logits, keys, texts.position)
        chosen = jnp.where(texts.ended, end, chosen)
        exits = jnp.where(texts.ended, NO_EXIT, exits)
        ended = texts.ended | (chosen == end)
        return Texts(cache, chosen, ended, texts.position + 1), (chosen, exits)

    texts, (ids, exits) = jax.lax.scan(step, texts, length=count)
    return texts, ids, exits
