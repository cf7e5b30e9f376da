"""Quality against compute: the loss of a cascade at many thresholds, and what a token costs there.

Each point is a share of hard tokens: the threshold is that quantile of the scores of calibration tokens. The loss is
that of other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from newllm_jax.bars import progress_bar
from newllm_jax.cascade.design_decoders import design_decoder
from newllm_jax.cascade.ensemble import TrainedStage, ensemble_losses
from newllm_jax.cascade.extraction import Tokens, extract, run_stage
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
from newllm_jax.cascade.run import CascadeRun, DesignRun, restore_cascade
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.cascade.states import spare_folder
from newllm_jax.config import Criterion, check
from newllm_jax.records.results import check_fingerprints
from newllm_jax.smollm.alpaca import STRIDE, AlpacaChunks, load_alpaca
from newllm_jax.smollm.base import fingerprints
from newllm_jax.smollm.flops import Costs
from newllm_jax.smollm.frontier_points import model_losses, point
from newllm_jax.smollm.generation_speed import generation_speed
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.step import count_parameters

Policy: TypeAlias = Literal["criterion", "oracle", "random"]
Entry: TypeAlias = dict[str, Any]  # of the frontier: a curve or a point, and what it is of
POLICIES: tuple[Policy, ...] = ("criterion", "oracle", "random")
SHARES = tuple(step / 10 for step in range(11))  # of hard tokens


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
        threshold = share_threshold(scores, share)
        hard_path = hard_tokens(measured, threshold)
        losses, hard_share = routed_losses(trained, chunks, hard_path).losses, float(hard_path.mean())
        facts = {"asked": share, "hard_share": hard_share, "threshold": threshold}
        points.append(point(losses, costs.mean(hard_share), **facts))
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
    """Points of stages of the published design: every one of them hands on the same share of its tokens.

    Of a token's models all need their heads, for their scores; by the cosine only the last, for the prediction.
    """
    cost, points = Costs.from_config(llama), list[dict[str, Any]]()
    stage_cost = cost.published_stage(stage.config.num_layers, criterion)
    for share in shares:
        trained = stages_at(share, calibration, stage, stages, criterion)
        losses, depth = ensemble_losses(tokens, stage, trained, criterion)
        goes_on = float(np.mean(depth > 0))
        flops = (cost.base + float(depth.mean()) * stage_cost) / cost.base
        points.append(point(losses.reshape(-1, STRIDE), flops, asked=share, hard_share=goes_on))
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


def frontier_entries(run_dir: str | Path, elsewhere: Mapping[str, np.ndarray], speed: bool = False) -> list[Entry]:
    """The curves of a run on its test chunks: by its criterion, by an oracle and by chance.

    Args:
      elsewhere: chunks of other texts by name, on which the run is measured with its own threshold; one of the
        published design with that of its hard ratio, from the calibration tokens.
      speed: whether generation is timed at every threshold of its criterion.

    Raises:
      InputError: a run without test chunks.
    """
    run = restore_cascade(run_dir)
    data = load_alpaca(run.tokenizer, run.config)
    check_fingerprints(run.run, fingerprints(run.base, data))
    check("test_chunks", len(data.test), f"above 0 in {run.run.path}, for a frontier", len(data.test) > 0)
    facts = {"name": run.run.path.name, "system": run.config.system, "config": run.config.to_dict()}
    if isinstance(run, DesignRun):
        return _design_entries(run, data, elsewhere, facts, speed)
    return [{**facts, **_published_entry(run, data, elsewhere)}]


def _design_entries(
    run: DesignRun, data: AlpacaChunks, elsewhere: Mapping[str, np.ndarray], facts: Entry, speed: bool
) -> list[Entry]:  # fmt: skip
    trained, strict = run.trained, run.base.model
    size = count_parameters(trained.params)
    costs = trained.design.costs(strict.config)

    def at_threshold(chunks: np.ndarray) -> Entry:
        if not run.kept_stages:
            return point(model_losses(strict, trained.base, chunks), 1.0, hard_share=0.0)
        hard = hard_tokens(token_path_scores(trained, strict, run.routing.probe, chunks), run.routing.threshold)
        share = float(hard.mean())
        return point(routed_losses(trained, chunks, hard).losses, costs.mean(share), hard_share=share)

    entries = list[Entry]()
    for policy in POLICIES:
        points = design_curve(trained, strict, run.routing, data.threshold_chunks, data.test, policy)
        entries.append({**facts, "policy": policy, "trained_parameters": size, "points": points})
    entries[0]["chosen"] = at_threshold(data.test)
    if speed:
        for each in (*entries[0]["points"], entries[0]["chosen"]):
            each["speed"] = _speed(run, each.get("threshold", run.routing.threshold), data.test)
    entries[0]["elsewhere"] = {name: at_threshold(chunks) for name, chunks in elsewhere.items()}
    return entries


def _speed(run: DesignRun, threshold: float, chunks: np.ndarray) -> dict[str, Any]:
    """`generation_speed` of a design at a threshold."""
    routing = Routing(threshold, run.routing.probe)
    decoder, params, _ = design_decoder(replace(run, routing=routing, kept_stages=1))
    return generation_speed(decoder, params, chunks)


def _published_entry(run: CascadeRun, data: AlpacaChunks, elsewhere: Mapping[str, np.ndarray]) -> Entry:
    base, criterion, stages = run.base.model, run.config.criterion, list(run.stages)
    params = jax.device_put(run.base.params)

    def read(chunks: np.ndarray) -> Tokens:
        folder = spare_folder(chunks[:, 1:].size, base.config.hidden_size)
        with progress_bar("base: hidden states", len(chunks)) as advance:
            return extract(base, params, chunks, criterion, advance=advance, folder=folder)

    scored = read(data.threshold_chunks)

    def curve(chunks: np.ndarray, shares: Sequence[float]) -> list[Entry]:
        tokens = read(chunks)
        return published_curve(tokens, scored, run.stage, stages, criterion, base.config, shares)

    return {
        "policy": "criterion",
        "trained_parameters": sum(count_parameters(stage.params) for stage in stages),
        "points": curve(data.test, SHARES),
        "chosen": curve(data.test, [run.config.hard_ratio])[0],
        "elsewhere": {name: curve(chunks, [run.config.hard_ratio])[0] for name, chunks in elsewhere.items()},
    }
