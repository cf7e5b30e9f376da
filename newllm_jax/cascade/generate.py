"""Text from a base and its stages with early exit, token by token.

The base reads every token and keeps its keys and values, wherever the token then exits; a stage sees one token and has
nothing to keep. The last hidden state is handed on while its score is at or below the next stage's threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.hardness import token_scores
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.config import Criterion, check
from newllm_jax.decoding.sampling import Sampling, choose, narrow
from newllm_jax.smollm.model import KVCache, SmolLM2, empty_cache
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.smollm.tokenizer import Tokenizer
from newllm_jax.training.step import Params

PROMPT_PIECE = 32
CACHE_PIECE = 256  # caches are a multiple of this long, so that prompts of any length share compiled programs


@dataclass
class Exits:
    """How many tokens exited where: `counts[0]` at the base, `counts[k]` at stage k."""

    counts: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        names = ["base", *(f"stage {number}" for number in range(1, len(self.counts)))]
        return ", ".join(f"{name} {count}" for name, count in zip(names, self.counts, strict=True))


def generate_tokens(
    base: Pretrained,
    stage: Stage | None,
    stages: Sequence[TrainedStage],
    criterion: Criterion,
    ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    exits: Exits | None = None,
) -> Iterator[int]:
    """Streams the ids that follow a prompt, up to the end of the turn or `max_tokens`.

    Args:
      base, stage, stages, criterion: as a `CascadeRun` has them; with no stages the text is the base's own.
      ids: the prompt, at least one id.
      exits: counts where each id was predicted.
    """
    check("prompt", "", "at least one token", len(ids) > 0)
    check("max_words", max_tokens, "0 or more", max_tokens >= 0)
    check("seed", seed, "from 0 to 2147483647", 0 <= seed < 2**31)
    params = jax.device_put(base.params)
    trained = [TrainedStage(jax.device_put(entry.params), entry.threshold) for entry in stages]
    exits = exits if exits is not None else Exits()
    exits.counts = [0] * (len(trained) + 1)
    capacity = -(-(len(ids) + max_tokens) // CACHE_PIECE) * CACHE_PIECE
    cache = empty_cache(base.model.config, 1, capacity)
    whole = (len(ids) - 1) // PROMPT_PIECE * PROMPT_PIECE
    for start in range(0, whole, PROMPT_PIECE):
        piece = jnp.asarray([ids[start : start + PROMPT_PIECE]])
        cache = read_token(base.model, criterion, params, cache, piece)[0]
    rest = list(ids[whole:])
    key = jax.random.key(seed)
    for token in rest[:-1]:
        cache = read_token(base.model, criterion, params, cache, jnp.asarray([[token]]))[0]
    token = rest[-1]
    for position in range(max_tokens):
        cache, hidden, logits, score = read_token(base.model, criterion, params, cache, jnp.asarray([[token]]))
        depth = 0
        while depth < len(trained) and float(score) <= trained[depth].threshold:
            hidden, logits, score = cast(Any, hand_on)(stage, criterion, trained[depth].params, hidden)
            depth += 1
        token = int(next_token(sampling, logits, jax.random.fold_in(key, position)))
        exits.counts[depth] += 1
        if token == base.tokenizer.eos_id:
            return
        yield token


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def read_token(
    base: SmolLM2, criterion: Criterion, params: Params, cache: KVCache, ids: jax.Array
) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:
    """Feeds `ids [1, time]`: the cache by then; hidden state `[1, hidden]`, logits `[vocab]` and score of the last."""
    states: Any = base.apply({"params": params}, ids, cache, method="hidden")
    last = states.last[:, -1]
    logits: Any = base.apply({"params": params}, last, method="logits")
    return states.cache, last, logits[0], token_scores(criterion, states.embedding[:, -1], last, logits)[0]


@partial(jax.jit, static_argnums=(0, 1))
def hand_on(
    stage: Stage, criterion: Criterion, params: Params, hidden: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a stage makes of one token's hidden state `[1, hidden]`: hidden state, logits `[vocab]`, score."""
    last, logits = cast(tuple[jax.Array, jax.Array], stage.apply({"params": params}, hidden))
    return last, logits[0], token_scores(criterion, hidden, last, logits)[0]


@partial(jax.jit, static_argnums=0)
def next_token(sampling: Sampling, logits: jax.Array, key: jax.Array) -> jax.Array:
    """The id chosen from `logits [vocab]`."""
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
    if not tokenizer.chat_template:
        return tokenizer.encode(prompt)
    return tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]))
