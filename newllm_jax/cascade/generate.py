"""Text from a base and its stages with early exit, token by token.

The base reads every token, wherever the token then exits; a stage sees one token and has nothing to remember. The last
hidden state is handed to the next stage while the token is hard, by the rule of `hardness.is_hard`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.cascade.design_decoders import SkipDecoder, design_decoder
from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.hardness import is_hard, token_scores
from newllm_jax.cascade.run import CascadeRun, DesignRun
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.cascade.stage.single_token import run_blocks
from newllm_jax.config import Criterion
from newllm_jax.decoding.batches import Batches
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.loop import Decoder
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.smollm.decoder import TokenCache, TokenWeights, read_prompt, token_states, token_weights
from newllm_jax.smollm.flops import Costs
from newllm_jax.smollm.generate import generate_answers, generate_tokens, prompt_ids, stream_text
from newllm_jax.smollm.generate import in_precision as in_precision
from newllm_jax.smollm.model import SmolLM2, rms_norm
from newllm_jax.smollm.token_step import multiply_rows
from newllm_jax.training.step import Params


class CascadeParams(NamedTuple):
    """The parameters of a base and its stages.

    Attributes:
      base: of the base.
      stages: of each stage.
      thresholds: `[stages]` float32; a score at or below one hands the token on to that stage.
    """

    base: Params
    stages: tuple[Params, ...]
    thresholds: Any


class StageWeights(NamedTuple):
    """The parameters of a stage for one token at a time.

    Attributes:
      layers: the parameters of one block each, with a layer axis of length 1, as `run_blocks` takes them.
      norm: `[H]`, the scale of the final norm.
      head: `[V, H]`.
    """

    layers: tuple[Any, ...]
    norm: jax.Array
    head: jax.Array


class CascadeWeights(NamedTuple):
    """The parameters of `CascadeDecoder.step`; thresholds as in `CascadeParams`."""

    base: TokenWeights
    stages: tuple[StageWeights, ...]
    thresholds: jax.Array


@dataclass(frozen=True)
class CascadeDecoder:
    """A base and its stages: a token exits at the base (0) or at stage k.

    Attributes:
      base: the base model.
      stage: the architecture of all stages.
      stages: how many there are.
      criterion: of hardness.
    """

    base: SmolLM2
    stage: Stage
    stages: int
    criterion: Criterion

    @property
    def exits(self) -> int:
        """The base and every stage."""
        return self.stages + 1

    def prepare(self, params: CascadeParams) -> CascadeWeights:
        """The parameters of base and stages, layers one by one."""
        stages = tuple(stage_weights(each) for each in params.stages)
        return CascadeWeights(token_weights(self.base, params.base), stages, params.thresholds)

    def start(self, params: CascadeParams, ids: jax.Array, length: jax.Array, capacity: int) -> TokenCache:
        """The base's cache after the first `length` of `ids [B, T]`; the stages read nothing of a prompt."""
        return read_prompt(self.base, params.base, ids, length, capacity)

    def step(
        self, weights: CascadeWeights, cache: TokenCache, tokens: jax.Array
    ) -> tuple[TokenCache, jax.Array, jax.Array]:
        """The cache with `tokens [B]`; logits `[B, V]` of the base or of the stage at which each exits; those exits."""
        cache, (embedding, last, logits) = token_states(self.base, weights.base, cache, tokens)
        score = token_scores(self.criterion, embedding, last, logits)
        reached, exits = jnp.ones(len(tokens), bool), jnp.zeros(len(tokens), jnp.int32)
        states = last, logits, score
        for number, stage in enumerate(weights.stages):
            reached &= is_hard(states[2], weights.thresholds[number])
            states = self._hand_on(stage, reached, states)
            exits += reached
        return cache, states[1], exits

    def _hand_on(self, weights: StageWeights, reached: jax.Array, states: tuple[jax.Array, ...]) -> Any:
        """Last hidden states, logits and scores after a stage, which is computed only if a token reaches it."""

        def run(states: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            hidden, logits, score = states
            last, stage_logits = run_stage(self.stage, weights, hidden)
            stage_score = token_scores(self.criterion, hidden, last, stage_logits)
            return (
                jnp.where(reached[:, None], last, hidden),
                jnp.where(reached[:, None], stage_logits, logits),
                jnp.where(reached, stage_score, score),
            )

        return jax.lax.cond(jnp.any(reached), run, lambda states: states, states)


def stage_weights(params: Params) -> StageWeights:
    """The parameters of a stage, its layers one by one."""
    backbone: Any = params["backbone"]
    blocks, norm = backbone["blocks"], backbone["norm"]["scale"]
    count = len(blocks["attention_norm"]["scale"])
    layers = (jax.tree.map(lambda leaf, layer=layer: leaf[layer : layer + 1], blocks) for layer in range(count))
    return StageWeights(tuple(layers), norm, params["embed"]["embedding"])


def run_stage(stage: Stage, weights: StageWeights, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `Stage` computes of `hidden [B, H]`: last hidden states `[B, H]` and logits `[B, V]`."""
    one_layer, x = replace(stage.config, num_layers=1), hidden
    for blocks in weights.layers:
        x: Any = run_blocks(one_layer, stage.precision, blocks, x)
    last = rms_norm(x, weights.norm, stage.config.rms_norm_eps)
    return last, multiply_rows(last, weights.head, stage.precision)


def cascade_params(base: Params, stages: Sequence[TrainedStage]) -> CascadeParams:
    """The parameters of a `CascadeDecoder`, from those of the base and the trained stages."""
    thresholds = np.asarray([each.threshold for each in stages], np.float32)
    return CascadeParams(base, tuple(each.params for each in stages), thresholds)


def generate(
    run: CascadeRun | DesignRun,
    prompt: str,
    *,
    max_words: int = 100,
    seed: int = 0,
    sampling: Sampling | None = None,
    exits: Exits | None = None,
) -> Iterator[str]:
    """Streams the answer to a prompt; arguments and errors of `generation.generate`."""
    ids, exits = prompt_ids(run.tokenizer, prompt), exits or Exits()
    decoder, params, exits.costs = _decoder(run)
    if isinstance(decoder, SkipDecoder):
        exits.names = ["layers skipped", "whole base"]
    tokens = generate_tokens(
        run.base, ids, max_words, sampling or Sampling(), seed, decoder=decoder, params=params, exits=exits
    )  # fmt: skip
    return stream_text(run.tokenizer, tokens)


def generate_all(run: CascadeRun | DesignRun, prompts: Sequence[str], asked: Batches) -> list[str]:
    """The answer to each of many prompts; errors of `generation.generate_all`."""
    decoder, params, _ = _decoder(run)
    return generate_answers(run.base, prompts, asked, decoder=decoder, params=params)


def _decoder(run: CascadeRun | DesignRun) -> tuple[Decoder, Any, list[float]]:
    """The decoder of a run, its parameters, and what a token costs at each exit."""
    if isinstance(run, DesignRun):
        return design_decoder(run)
    cost, stage = Costs.from_config(run.base.model.config), run.stage.config
    passed = cost.published_stage(stage.num_layers, run.config.criterion) / cost.base
    decoder = CascadeDecoder(run.base.model, run.stage, len(run.stages), run.config.criterion)
    costs = [1 + number * passed for number in range(decoder.exits)]
    return decoder, cascade_params(run.base.params, run.stages), costs
