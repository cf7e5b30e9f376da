"""Text from a SmolLM2, token by token, from a prompt as a user's turn.

What reads the tokens and predicts the next is a `Decoder`: the base itself, or the base with the stages of CASCADE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from newllm_jax.config import check
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.loop import Decoder, generated_tokens
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.smollm.decoder import BaseDecoder
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
    check("prompt", "", "at least one token", len(ids) > 0)
    llama = base.model.config
    check("max_words", max_tokens, f"with the {len(ids)} tokens of the prompt at most {llama.max_position}, the "
          "longest text that the model was trained on", len(ids) + max_tokens <= llama.max_position)  # fmt: skip
    capacity = -(-(len(ids) + max_tokens) // CACHE_PIECE) * CACHE_PIECE
    a_token = 2 * llama.num_layers * llama.num_kv_heads * llama.head_dim * FLOAT  # keys and values
    check_memory({"max_words": capacity * a_token})
    decoder, exits = decoder or BaseDecoder(base.model), exits or Exits()
    exits.counts = [0] * decoder.exits
    pieces = generated_tokens(
        decoder, base.params if params is None else params, np.asarray([ids]), max_tokens, capacity, sampling,
        jax.random.key(seed)[None], base.tokenizer.eos_id,
    )  # fmt: skip
    for chosen, taken in pieces:
        for token, exit_number in zip(chosen[0].tolist(), taken[0].tolist(), strict=True):
            exits.counts[exit_number] += 1
            if token == base.tokenizer.eos_id:
                return
            yield token


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
