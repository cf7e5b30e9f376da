"""Text from a trained New-LLM, word by word: the context vector is all that it remembers, however long the text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.sampling import Sampling, choose, narrow
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import NewLLMRun
from newllm_jax.newllm.tokenizer import BOS, EOS, PAD, UNK
from newllm_jax.training.step import Params

PROMPT_PIECE = 64


def restrict(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits `[V]` with every word ruled out that sampling excludes (-inf)."""
    excluded = jnp.array([PAD, BOS] if sampling.unknown else [PAD, BOS, UNK])
    logits = logits.at[excluded].set(-jnp.inf)
    return narrow(logits, sampling)


@partial(jax.jit, static_argnums=(0, 1))
def next_word(
    model: ContextVectorLM,
    sampling: Sampling,
    params: Params,
    context: jax.Array,
    word: jax.Array,
    key: jax.Array,
    position: int,
) -> tuple[jax.Array, jax.Array]:
    """Feeds a word (scalar id) to `context [1, C]`: the word chosen after it, and the context vector by then.

    Args:
      key: of the whole text.
      position: of the chosen word in it; each has a draw of its own.
    """
    logits, context = model.apply({"params": params}, word[None, None], context)  # type: ignore[misc]
    logits = restrict(logits[0, 0], sampling)
    return choose(logits, sampling, jax.random.fold_in(key, position)), context


def generate(
    run: NewLLMRun,
    prompt: str = "",
    *,
    max_words: int = 100,
    seed: int = 0,
    sampling: Sampling | None = None,
    exits: Exits | None = None,
) -> Iterator[str]:
    """Streams the words that follow a prompt; arguments of `systems.generate`. The model has no exits.

    Any prompt will do: unknown words are read as `<UNK>`, an empty one starts a text. Memory does not grow with length.
    A model of a stream, packed too, goes on after the end of a text, with a new line.
    """
    ids, stream = run.tokenizer.encode_prompt(prompt), run.config.text != "windows"
    *read, last = [EOS, *ids[1:]] if stream else ids  # in a stream, a text begins where the one before ends
    context = run.model.initial_context(1)
    # In pieces of one length, and the rest one by one: two compilations for prompts of any length.
    whole = len(read) - len(read) % PROMPT_PIECE
    for start in range(0, whole, PROMPT_PIECE):
        context = _read(run.model, run.params, context, jnp.array([read[start : start + PROMPT_PIECE]]))
    for index in read[whole:]:
        context = _read(run.model, run.params, context, jnp.array([[index]]))
    word, key, sampling = jnp.int32(last), jax.random.key(seed), sampling or Sampling()
    for position in range(max_words):
        word, context = next_word(run.model, sampling, run.params, context, word, key, position)
        if int(word) == EOS and not stream:
            return
        yield "\n" if int(word) == EOS else run.tokenizer.words[int(word)]


@partial(jax.jit, static_argnums=0)
def _read(model: ContextVectorLM, params: Params, context: jax.Array, ids: jax.Array) -> jax.Array:
    return model.apply({"params": params}, ids, context)[1]  # type: ignore[index]
