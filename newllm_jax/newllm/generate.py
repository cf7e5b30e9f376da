"""Text from a trained New-LLM, word by word: the context vector is all that it remembers, however long the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

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
    """Streams the words that follow a prompt; arguments of `systems.generate`. The model has no exits.

    Any prompt will do: unknown words are read as `<UNK>`, an empty one starts a text. Memory does not grow with length.
    A model of a stream, packed too, goes on after the end of a text, with a new line.
    """
    ids, stream = run.tokenizer.encode_prompt(prompt), run.config.text != "windows"
    ids = [EOS, *ids[1:]] if stream else ids  # in a stream, a text begins where the one before ends
    sampling = sampling or Sampling()
    made = generated_tokens(
        ContextDecoder(run.model, sampling.unknown), run.params, np.asarray([ids]), max_words, NO_LIMIT, sampling,
        jax.random.key(seed)[None], None if stream else EOS, WORDS_PER_CALL,
    )  # fmt: skip
    for words, _ in made:
        for word in words[0].tolist():
            if word == EOS and not stream:
                return
            yield "\n" if word == EOS else run.tokenizer.words[word]
