"""Text from a SmolLM2, token by token, from a prompt as a user's turn.

The base reads every token and keeps its keys and values. What predicts the next token from its last hidden state is a
function: the base's own logits, or the stages of CASCADE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from newllm_jax.config import check
from newllm_jax.decoding.sampling import Sampling, choose, narrow
from newllm_jax.smollm.model import KVCache, SmolLM2, empty_cache
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.smollm.tokenizer import Tokenizer
from newllm_jax.training.memory import FLOAT, check_memory
from newllm_jax.training.step import Params

PROMPT_PIECE = 32
CACHE_PIECE = 256  # caches are a multiple of this long, so that prompts of any length share compiled programs


class TokenStates(NamedTuple):
    """What the base makes of one token.

    Attributes:
      embedding, last: its embedding and last hidden state, `[1, H]`.
      logits: `[1, V]`.
    """

    embedding: jax.Array
    last: jax.Array
    logits: jax.Array


Predict: TypeAlias = Callable[[TokenStates], jax.Array]  # -> the logits [V] that the next token is drawn from


def generate_tokens(
    base: Pretrained,
    ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    predict: Predict = lambda states: states.logits[0],
) -> Iterator[int]:
    """Streams the ids that follow a prompt, up to the end of the turn or `max_tokens`.

    Args:
      ids: the prompt, at least one id.
      predict: called for every token whose successor is generated, not for the rest of the prompt.

    Raises:
      InputError: an empty prompt, or a text longer than the model was trained on, or than memory has room for.
    """
    check("prompt", "", "at least one token", len(ids) > 0)
    llama = base.model.config
    check("max_words", max_tokens, f"with the {len(ids)} tokens of the prompt at most {llama.max_position}, the "
          "longest text that the model was trained on", len(ids) + max_tokens <= llama.max_position)  # fmt: skip
    capacity = -(-(len(ids) + max_tokens) // CACHE_PIECE) * CACHE_PIECE
    a_token = 2 * llama.num_layers * llama.num_kv_heads * llama.head_dim * FLOAT  # keys and values
    check_memory({"max_words": capacity * a_token})
    params, cache = jax.device_put(base.params), empty_cache(llama, 1, capacity)
    whole = (len(ids) - 1) // PROMPT_PIECE * PROMPT_PIECE
    for start in range(0, whole, PROMPT_PIECE):
        cache, _ = read_ids(base.model, params, cache, jnp.asarray([ids[start : start + PROMPT_PIECE]]))
    *rest, token = ids[whole:]
    for earlier in rest:
        cache, _ = read_ids(base.model, params, cache, jnp.asarray([[earlier]]))
    key = jax.random.key(seed)
    for position in range(max_tokens):
        cache, states = read_ids(base.model, params, cache, jnp.asarray([[token]]))
        token = int(next_token(sampling, predict(states), jax.random.fold_in(key, position)))
        if token == base.tokenizer.eos_id:
            return
        yield token


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_ids(base: SmolLM2, params: Params, cache: KVCache, ids: jax.Array) -> tuple[KVCache, TokenStates]:
    """Feeds `ids [1, T]`: the cache after them, and the states of the last of them."""
    states: Any = base.apply({"params": params}, ids, cache, method="hidden")
    last = states.last[:, -1]
    logits: Any = base.apply({"params": params}, last, method="logits")
    return states.cache, TokenStates(states.embedding[:, -1], last, logits)


@partial(jax.jit, static_argnums=0)
def next_token(sampling: Sampling, logits: jax.Array, key: jax.Array) -> jax.Array:
    """The id chosen from `logits [V]`."""
    return choose(narrow(logits, sampling), sampling, key)


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """The text of ids as they come; bytes wait until they are whole characters."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):
            waiting.clear()
            yield text
    if waiting:
        yield tokenizer.decode(waiting)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as the user's turn of a conversation; as plain text where the model has no chat template."""
    check("prompt", prompt, "a text in UTF-8", not any("\ud800" <= letter <= "\udfff" for letter in prompt))
    if not tokenizer.chat_template:
        return tokenizer.encode(prompt)
    return tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]))
