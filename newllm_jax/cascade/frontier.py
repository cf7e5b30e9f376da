"""Quality against compute: the loss of a cascade at many thresholds, and what a token costs there.

Each point is a share of hard tokens: the threshold is that quantile of the scores of calibration tokens. The loss is
measured on others, with intervals by the bootstrap over chunks (Efron 1979), whose tokens are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from newllm_jax.cascade.ensemble import TrainedStage, evaluate_ensemble
from newllm_jax.cascade.extraction import Tokens, run_stage
from newllm_jax.cascade.flops import Costs
from newllm_jax.cascade.hardness import select_hard
from newllm_jax.cascade.paths import (
    Routing,
    TrainedDesign,
    both_paths,
    hard_tokens,
    routed_losses,
    share_threshold,
    token_path_scores,
)
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.config import Criterion
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.losses import perplexity

Policy: TypeAlias = Literal["criterion", "oracle", "random"]
POLICIES: tuple[Policy, ...] = ("criterion", "oracle", "random")
SHARES = tuple(step / 10 for step in range(11))  # of hard tokens
RESAMPLINGS, INTERVAL = 1000, (2.5, 97.5)  # percentiles


def design_curve(
    trained: TrainedDesign,
    strict: SmolLM2,
    routing: Routing,
    calibration: np.ndarray,
    chunks: np.ndarray,
    policy: Policy = "criterion",
    shares: Sequence[float] = SHARES,
) -> list[dict[str, Any]]:
    """Points of a design over chunks `[chunks, 129]`, a share of hard tokens each.

    Args:
      strict: the base's architecture in strict float32.
      calibration: the chunks whose scores give the thresholds.
      policy: who chooses the hard tokens: the run's criterion; an oracle that knows what each token would gain if all
        took the hard path; or chance.
    """
    if policy == "criterion":
        scores, measured = (token_path_scores(trained, strict, routing.probe, each) for each in (calibration, chunks))
    elif policy == "random":
        random = np.random.default_rng(0)
        scores, measured = (
            random.random((len(each), each.shape[1] - 1)).astype(np.float32) for each in (calibration, chunks)
        )
    else:
        easy, hard = both_paths(trained, chunks)
        scores = measured = hard.losses - easy.losses
    costs, points = trained.design.costs(strict.config), list[dict[str, Any]]()
    for share in shares:
        hard_path = hard_tokens(measured, share_threshold(scores, share))
        losses = routed_losses(trained, chunks, hard_path).losses
        points.append(
            point(losses, costs.mean(float(hard_path.mean())), asked=share, hard_share=float(hard_path.mean()))
        )
    return points


def published_curve(
    tokens: Tokens,
    calibration: Tokens,
    stage: Stage,
    stages: Sequence[TrainedStage],
    criterion: Criterion,
    llama: LlamaConfig,
    shares: Sequence[float] = SHARES,
) -> list[dict[str, Any]]:
    """Points of stages of the published design: every one of them hands on the same share of its tokens."""
    cost, points = Costs.of(llama), list[dict[str, Any]]()
    stage_cost = stage.config.num_layers * cost.lone_token_layer + cost.head
    for share in shares:
        trained = stages_at(share, calibration, stage, stages, criterion)
        row = evaluate_ensemble(tokens, stage, trained, criterion, 0)[-1]
        passed = sum(number * rate for number, rate in enumerate(row["exit_rates"]))  # stages, of a token
        needs_head = cost.base if criterion != "cosine" else cost.base - cost.head * (1 - row["exit_rates"][0])
        points.append({
            "asked": share, "hard_share": 1 - row["exit_rates"][0],
            "flops": (needs_head + passed * stage_cost) / cost.base,
            "loss": row["val_loss"], "ppl": row["val_ppl"],
        })  # fmt: skip
    return points


def stages_at(
    share: float, tokens: Tokens, stage: Stage, stages: Sequence[TrainedStage], criterion: Criterion
) -> list[TrainedStage]:
    """The stages with thresholds by which each gets this share of the tokens of the one before."""
    found = list[TrainedStage]()
    for each in stages:
        threshold = share_threshold(tokens.scores, share)
        found.append(TrainedStage(each.params, threshold))
        hard = select_hard(tokens.scores, threshold)
        if len(hard) < 2:
            break
        tokens = run_stage(stage, each.params, tokens.take(hard), criterion)
    return found


def point(losses: np.ndarray, flops: float, **facts: Any) -> dict[str, Any]:
    """A point of the frontier from the losses `[chunks, 128]` of its tokens."""
    by_chunk = losses.mean(axis=1, dtype=np.float64)
    low, high = bootstrap(by_chunk)
    loss = float(by_chunk.mean())
    return {**facts, "flops": flops, "loss": loss, "ppl": perplexity(loss), "low": low, "high": high}


def bootstrap(by_chunk: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The interval in which the mean of other chunks like these would lie 95 times in 100."""
    drawn = np.random.default_rng(seed).integers(0, len(by_chunk), (RESAMPLINGS, len(by_chunk)))
    low, high = np.percentile(by_chunk[drawn].mean(axis=1), INTERVAL)
    return float(low), float(high)
