"""Text from a trained New-LLM, word by word: the context vector is all that it remembers, however long the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.config import Precision
from newllm_jax.decoding.batches import Batches, texts_of_prompts
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.loop import generated_tokens
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import NewLLMRun
from newllm_jax.newllm.tokenizer import BOS, EOS, PAD, UNK
from newllm_jax.training.step import Params

WORDS_PER_CALL = 16  # that the device makes before the host sees them: a call takes as long as a word or two
NO_LIMIT = 2**31 - 1  # tokens of a cache that is one vector


@dataclass(frozen=True)
class ContextDecoder:
    """New-LLM as the loop of `decoding.loop` uses it. The cache is the context vector, `[B, C]`.

    Attributes:
      unknown: whether `<UNK>` may be chosen.
    """

    model: ContextVectorLM
    unknown: bool = False

    @property
    def exits(self) -> int:
        return 1

    def prepare(self, params: Params) -> Params:
        """The parameters as they are."""
        return params

    def start(self, params: Params, ids: jax.Array, length: jax.Array, capacity: int) -> jax.Array:
        """The context vector after the first `length` of some ids."""

        def read(place: jax.Array, context: jax.Array) -> jax.Array:
            return self._read(params, context, jax.lax.dynamic_slice_in_dim(ids, place, 1, axis=1))[1]

        return jax.lax.fori_loop(0, length, read, self.model.initial_context(len(ids)))

    def step(self, weights: Params, cache: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The context vector after one more word of each text, and the logits of what follows."""
        logits, context = self._read(weights, cache, tokens[:, None])
        excluded = jnp.array([PAD, BOS] if self.unknown else [PAD, BOS, UNK])
        return context, logits[:, 0].at[:, excluded].set(-jnp.inf), jnp.zeros(len(tokens), jnp.int32)

    def _read(self, params: Params, context: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.model.apply({"params": params}, ids, context)  # type: ignore[return-value]


def generate(
    run: NewLLMRun,
    prompt: str = "",
    *,
    max_words: int = 100,
    seed: int = 0,
    sampling: Sampling | None = None,
    exits: Exits | None = None,
) -> Iterator[str]:
    """Streams the words that follow a prompt; arguments of `generation.generate`. The model has no exits.

    Any prompt will do: unknown words are read as `<UNK>`, an empty one starts a text. Memory does not grow with length.
    A model of a stream, packed too, goes on after the end of a text, with a new line.
    """
    end, key = _end(run), jax.random.key(seed)[None]
    for words, _ in _pieces(run, np.asarray([prompt_ids(run, prompt)]), key, max_words, sampling or Sampling()):
        for word in words[0].tolist():
            if word == end:
                return
            yield _text(run, word)


def generate_all(run: NewLLMRun, prompts: Sequence[str], asked: Batches) -> list[str]:
    """The continuation of each of many prompts."""

    def make(ids: np.ndarray, keys: jax.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return _pieces(run, ids, keys, asked.max_words, asked.sampling)

    texts = texts_of_prompts([prompt_ids(run, prompt) for prompt in prompts], make, _end(run), asked)
    return [" ".join(_text(run, word) for word in text) for text in texts]


def in_precision(run: NewLLMRun, precision: Precision) -> NewLLMRun:
    """The run with a model whose products are in a precision."""
    return replace(run, model=run.model.clone(precision=precision))


def prompt_ids(run: NewLLMRun, prompt: str) -> list[int]:
    """The ids of a prompt and of what begins a text; in a stream, a text begins where the one before ends."""
    ids = run.tokenizer.encode_prompt(prompt)
    return ids if run.config.text == "windows" else [EOS, *ids[1:]]


def _end(run: NewLLMRun) -> int | None:
    """The id that ends a text; a stream goes on."""
    return EOS if run.config.text == "windows" else None


def _text(run: NewLLMRun, word: int) -> str:
    return "\n" if word == EOS else run.tokenizer.words[word]


def _pieces(
    run: NewLLMRun, prompts: np.ndarray, keys: jax.Array, max_words: int, sampling: Sampling
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`loop.generated_tokens` of some prompts `[B, length]`."""
    decoder = ContextDecoder(run.model, sampling.unknown)
    return generated_tokens(
        decoder, run.params, prompts, max_words, NO_LIMIT, sampling, keys, _end(run), WORDS_PER_CALL
    )  # fmt: skip
