"""The base and its stages with early exit, measured over all tokens (the next step that the report of CASCADE names).

A token starts at the base. While the score that a model gave it is at or below the threshold of the next stage, it is
handed on; else it exits with the prediction it has. With k stages, what reaches stage k stays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from newllm_jax.cascade.extraction import Advance, Tokens, run_stage
from newllm_jax.cascade.hardness import select_hard
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.config import Criterion, check, checked
from newllm_jax.training.losses import perplexity
from newllm_jax.training.step import Params, count_parameters


@dataclass(frozen=True)
class TrainedStage:
    """A stage as the ensemble uses it.

    Attributes:
      params: its parameters.
      threshold: tokens that the model before it scores at or below this are handed on to it.
    """

    params: Params
    threshold: float


def evaluate_ensemble(
    tokens: Tokens,
    stage: Stage,
    stages: Sequence[TrainedStage],
    criterion: Criterion,
    base_parameters: int,
    advance: Advance = lambda tokens: None,
) -> list[dict[str, Any]]:
    """Base, Base+1, ..., Base+k over all tokens of a split.

    Args:
      tokens: the outputs of the frozen base for a split.
      stage: the architecture of all stages.
      stages: in order; each runs on the tokens that are handed on to it only.

    Returns:
      The rows of `ensemble_rows`.

    >>> from newllm_jax.smollm.llama_config import LlamaConfig
    >>> size = LlamaConfig().hidden_size
    >>> outputs = np.ones((4, size), np.float32), np.arange(4, dtype=np.int32), np.zeros(4, np.float32)
    >>> tokens = Tokens(*outputs, losses=np.array([1, 2, 3, 4], np.float32), hits=np.array([True, False, False, True]))
    >>> (base,) = evaluate_ensemble(tokens, Stage(LlamaConfig(num_layers=8)), [], "cosine", 134_515_008)
    >>> base["val_loss"], base["val_accuracy"], base["exit_rates"]
    (2.5, 0.5, [1.0])
    """
    check("tokens", tokens, "Tokens", isinstance(tokens, Tokens))
    check("stage", stage, "a Stage", isinstance(stage, Stage))
    check("stages", stages, "a list of TrainedStage", isinstance(stages, Sequence)
          and all(isinstance(trained, TrainedStage) for trained in stages))  # fmt: skip
    checked("criterion", criterion, Criterion)
    checked("base_parameters", base_parameters, int, least=0)
    return measure_exits(tokens, stage, stages, criterion, base_parameters, advance)[0]


def measure_exits(
    tokens: Tokens,
    stage: Stage,
    stages: Sequence[TrainedStage],
    criterion: Criterion,
    base_parameters: int,
    advance: Advance = lambda tokens: None,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """What `evaluate_ensemble` gives for these arguments, and where each token exits with all stages: `[tokens]`."""
    losses, hits, depth = _by_stages(tokens, stage, stages, criterion, advance)
    parameters = [base_parameters + number * _size(stages) for number in range(len(stages) + 1)]
    return ensemble_rows(losses, hits, depth, parameters), depth


def ensemble_losses(
    tokens: Tokens, stage: Stage, stages: Sequence[TrainedStage], criterion: Criterion
) -> tuple[np.ndarray, np.ndarray]:
    """The loss (nats) of each token with all stages at hand, and how many of them it passes, each `[tokens]`."""
    losses, _, depth = _by_stages(tokens, stage, stages, criterion, lambda tokens: None)
    return losses[-1], depth


def _by_stages(
    tokens: Tokens, stage: Stage, stages: Sequence[TrainedStage], criterion: Criterion, advance: Advance
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arguments of `ensemble_rows`: losses and hits by the number of stages at hand, and depths."""
    losses, hits = [tokens.losses], [tokens.hits]
    reached = np.arange(len(tokens))
    depth = np.zeros(len(tokens), np.int32)
    for number, trained in enumerate(stages, 1):
        hard = select_hard(tokens.scores, trained.threshold)
        reached, tokens = reached[hard], tokens.take(hard)
        depth[reached] = number
        tokens = run_stage(stage, trained.params, tokens, criterion, advance)
        loss, hit = losses[-1].copy(), hits[-1].copy()
        loss[reached], hit[reached] = tokens.losses, tokens.hits
        losses.append(loss)
        hits.append(hit)
    return np.stack(losses), np.stack(hits), depth


def ensemble_rows(
    losses: np.ndarray, hits: np.ndarray, depth: np.ndarray, parameters: Sequence[int]
) -> list[dict[str, Any]]:
    """The ensembles with 0, 1, ..., k stages as `results.json` has them.

    Args:
      losses, hits: `[k + 1, tokens]`, row j those of the prediction that a token has with j stages at hand.
      depth: `[tokens]`, the number of stages that a token reaches with all k at hand.
      parameters: of each ensemble.
    """
    rows = []
    for stages, count in enumerate(parameters):
        exits = np.minimum(depth, stages)
        loss = float(np.mean(losses[stages], dtype=np.float64))
        groups = []
        for number in range(stages + 1):
            group = exits == number
            groups.append({
                "exit": number,
                "tokens": int(group.sum()),
                "base_loss": _mean(losses[0][group]),
                "loss": _mean(losses[stages][group]),
            })  # fmt: skip
        rows.append({
            "stages": stages,
            "parameters": count,
            "val_loss": loss,
            "val_ppl": perplexity(loss),
            "val_accuracy": float(np.mean(hits[stages])),
            "exit_rates": [group["tokens"] / len(depth) for group in groups],
            "exit_groups": groups,
        })  # fmt: skip
    return rows


def best_ensemble(rows: Sequence[dict[str, Any]]) -> int:
    """How many stages the best of some ensembles has, by its loss over all validation tokens; perhaps none.

    Of equal ones the smallest; so what is kept is never worse than with fewer stages, on the split that chose it.
    """
    return min(rows, key=lambda row: (row["val_loss"], row["stages"]))["stages"]


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values, dtype=np.float64)) if len(values) else None


def _size(stages: Sequence[TrainedStage]) -> int:
    return count_parameters(stages[0].params) if stages else 0
