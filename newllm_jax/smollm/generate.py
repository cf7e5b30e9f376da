"""Text from a SmolLM2, token by token, from a prompt as a user's turn.

What reads the tokens and predicts the next is a `Decoder`: the base itself, or the base with the stages of CASCADE.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.config import Precision, check
from newllm_jax.decoding.batches import Batches, texts_of_prompts
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.loop import Decoder, generated_tokens
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.errors import Note
from newllm_jax.smollm.fused_decoder import decoder_for, slow_text_warning
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.smollm.tokenizer import Tokenizer
from newllm_jax.training.memory import FLOAT, check_memory

CACHE_PIECE = 256  # caches are a multiple of this long, so that texts of any length share compiled programs


def generate_tokens(
    base: Pretrained,
    ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    *,
    decoder: Decoder | None = None,
    params: Any = None,
    exits: Exits | None = None,
) -> Iterator[int]:
    """Streams the ids that follow a prompt, up to the end of the turn or `max_tokens`.

    Args:
      ids: the prompt, at least one id.
      decoder: what makes the text from `base` and more; None for the base alone.
      params: of the decoder; None for those of the base.
      exits: counts where the generated tokens exited.

    Raises:
      InputError: an empty prompt, or a text longer than the model was trained on, or than memory has room for.
    """
    if decoder is None and (slow := slow_text_warning(base.model)):
        warnings.warn(slow, Note, stacklevel=2)
    decoder, exits = decoder or decoder_for(base.model, texts=1), exits or Exits()
    exits.counts = [0] * decoder.exits
    key = jax.random.key(seed)[None]
    for chosen, taken in _pieces(base, np.asarray([ids], int), key, max_tokens, sampling, decoder, params):
        for token, exit_number in zip(chosen[0].tolist(), taken[0].tolist(), strict=True):
            exits.counts[exit_number] += 1
            if token == base.tokenizer.eos_id:
                return
            yield token


def generate_answers(
    base: Pretrained,
    prompts: Sequence[str],
    asked: Batches,
    *,
    decoder: Decoder | None = None,
    params: Any = None,
) -> list[str]:
    """The whole answer to each of many prompts, see `generation.generate_all`; other arguments as `generate_tokens`."""

    def make(ids: np.ndarray, keys: jax.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        chosen = decoder or decoder_for(base.model, texts=len(ids))
        return _pieces(base, ids, keys, asked.max_words, asked.sampling, chosen, params)

    ids = [prompt_ids(base.tokenizer, prompt) for prompt in prompts]
    texts = texts_of_prompts(ids, make, base.tokenizer.eos_id, asked)
    return ["".join(stream_text(base.tokenizer, iter(text))) for text in texts]


def _pieces(
    base: Pretrained,
    prompts: np.ndarray,
    keys: jax.Array,
    max_tokens: int,
    sampling: Sampling,
    decoder: Decoder,
    params: Any,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`loop.generated_tokens` of some prompts `[B, length]`, with a cache that has room for them."""
    batch, length = prompts.shape
    check("prompt", "", "at least one token", length > 0)
    llama = base.model.config
    check("max_words", max_tokens, f"with the {length} tokens of the prompt at most {llama.max_position}, the "
          "longest text that the model was trained on", length + max_tokens <= llama.max_position)  # fmt: skip
    capacity = cache_capacity(length + max_tokens)
    a_token = 2 * llama.num_layers * llama.num_kv_heads * llama.head_dim * FLOAT  # keys and values
    check_memory({"max_words" if batch == 1 else "batch": batch * capacity * a_token})
    params = base.params if params is None else params
    return generated_tokens(
        decoder, params, prompts, max_tokens, capacity, sampling, keys, base.tokenizer.eos_id
    )  # fmt: skip


def cache_capacity(tokens: int) -> int:
    """The room of a cache for so many tokens: whole pieces."""
    return -(-tokens // CACHE_PIECE) * CACHE_PIECE


def in_precision(run: Any, precision: Precision) -> Any:
    """A run with a base, whose model computes in a precision; in half precision weights and caches are in it, too."""
    half = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
    model = run.base.model
    model = model.clone(dtype=half[precision]) if precision in half else model.clone(precision=precision)
    return replace(run, base=replace(run.base, model=model))


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
