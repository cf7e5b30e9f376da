"""Text from a base and its stages with early exit, token by token.

The base reads every token, wherever the token then exits; a stage sees one token and has nothing to remember. The last
hidden state is handed to the next stage while the token is hard, by the rule of `hardness.is_hard`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import jax

from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.hardness import is_hard, token_scores
from newllm_jax.cascade.run import CascadeRun
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.config import Criterion
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.smollm.generate import Predict, TokenStates, generate_tokens, prompt_ids, stream_text
from newllm_jax.training.step import Params


def generate(
    run: CascadeRun,
    prompt: str,
    *,
    max_words: int = 100,
    seed: int = 0,
    sampling: Sampling | None = None,
    exits: Exits | None = None,
) -> Iterator[str]:
    """Streams the answer to a prompt; arguments and errors of `systems.generate`."""
    ids = prompt_ids(run.tokenizer, prompt)
    predict = exit_rule(run.stage, run.stages, run.config.criterion, exits or Exits())
    return stream_text(run.tokenizer, generate_tokens(run.base, ids, max_words, sampling or Sampling(), seed, predict))


def exit_rule(stage: Stage, stages: tuple[TrainedStage, ...], criterion: Criterion, exits: Exits) -> Predict:
    """The prediction of the base or of the stage at which a token exits, which `exits` counts."""
    trained = [TrainedStage(jax.device_put(each.params), each.threshold) for each in stages]
    exits.counts = [0] * (len(trained) + 1)

    def predict(states: TokenStates) -> jax.Array:
        last, logits, depth = states.last, states.logits, 0
        score = _base_score(criterion, *states)
        while depth < len(trained) and is_hard(score, trained[depth].threshold):
            last, logits, score = cast(Any, _run_stage)(stage, criterion, trained[depth].params, last)
            depth += 1
        exits.counts[depth] += 1
        return logits[0]

    return predict


@partial(jax.jit, static_argnums=0)
def _base_score(criterion: Criterion, embedding: jax.Array, last: jax.Array, logits: jax.Array) -> jax.Array:
    """The score of one token, a scalar."""
    return token_scores(criterion, embedding, last, logits)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _run_stage(
    stage: Stage, criterion: Criterion, params: Params, hidden: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A stage on one token's hidden state `[1, H]`: its last hidden state, its logits `[1, V]`, its score."""
    last, logits = cast(tuple[jax.Array, jax.Array], stage.apply({"params": params}, hidden))
    return last, logits, token_scores(criterion, hidden, last, logits)[0]
