"""How well each criterion tells hard tokens: on a frozen base alone, or on the base of a run of a design.

A criterion is good where its hardness, the negated score, rises with the loss of the base, which is known only once the
next token is, and with the gain: the loss of a design's easy path less that of its hard path. Rank correlations
(Spearman 1904) measure both, over the validation tokens; ratios of perplexities tell how far it parts the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from newllm_jax.bars import progress_bar
from newllm_jax.cascade.extraction import Advance
from newllm_jax.cascade.hardness import hardness_threshold, is_hard, token_scores
from newllm_jax.cascade.paths import both_paths, each_batch, in_batches
from newllm_jax.cascade.probe import LARGEST_GAIN, probe_gains, train_probe
from newllm_jax.cascade.run import DesignRun, restore_design
from newllm_jax.cascade.states import States, spare_folder
from newllm_jax.config import CascadeConfig, Criterion
from newllm_jax.errors import InputError, shown
from newllm_jax.records.directory import RunDir
from newllm_jax.records.machine import command_line, environment
from newllm_jax.records.narration import Narrate
from newllm_jax.records.progress import narrate_facts
from newllm_jax.records.results import check_fingerprints, results_footer
from newllm_jax.records.stored_config import stored_config
from newllm_jax.smollm.alpaca import AlpacaChunks, load_alpaca
from newllm_jax.smollm.base import (
    base_results,
    fingerprints,
    load_base,
    load_base_and_data,
    source_facts,
    source_warnings,
)
from newllm_jax.smollm.flops import Costs, probe_cost
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.training.clock import Clock
from newllm_jax.training.losses import perplexity, token_losses
from newllm_jax.training.step import Params

SINGLE_PASS: tuple[Criterion, ...] = ("cosine", "entropy", "max_probability", "margin")
RUN_SETTINGS = ("hard_ratio", "seed")  # what may differ from those of a run; base and data are its own


@dataclass(frozen=True)
class BaseTokens:
    """What one pass of a base over a split gives; NumPy.

    Attributes:
      hidden: `[chunks, 128, H]`, the last hidden states; where they are many, a memory-mapped file.
      losses: `[chunks, 128]`, nats.
      scores: `[chunks, 128]` by criterion of `SINGLE_PASS`, low is hard.
    """

    hidden: np.ndarray
    losses: np.ndarray
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class Gains:
    """What the tokens of the splits gain on the hard path of a run: loss of the easy path less that of the hard one.

    Attributes:
      train, validation: `[chunks, 128]`, nats.
      easy_loss, hard_loss: the mean losses on validation where all tokens take one path.
    """

    train: np.ndarray
    validation: np.ndarray
    easy_loss: float
    hard_loss: float


def measure_hardness(
    settings: Mapping[str, Any], run_dir: str | Path | None = None, narrate: Narrate = print
) -> dict[str, Any]:
    """The quality of every criterion on a base and data, as the JSON of `newllm hardness` has it.

    Args:
      settings: of `CascadeConfig`: base, data, `hard_ratio`, `seed`. For a run only the last two.
      run_dir: of a run of a design other than the published one; with it gains are measured too.

    Raises:
      InputError: bad settings or sources, or a run of something else.
    """
    clock = Clock()
    if run_dir is None:
        run, config = None, CascadeConfig.from_dict(settings)
        base, data = load_base_and_data(config)
    else:
        run = restore_design_run(run_dir, settings)
        config, base = run.config.override(settings), run.base
        data = load_alpaca(run.tokenizer, config)
        check_fingerprints(run.run, fingerprints(base, data))
    _narrate(narrate, base, data, config, run)
    with progress_bar("base", len(data.train) + len(data.validation)) as advance:
        params = jax.device_put(base.params)
        train, validation = (read_base(base.model, params, each, advance) for each in (data.train, data.validation))
    with progress_bar("criteria", 0):
        gains = None if run is None else measure_gains(run, data)
        scores = validation.scores | fitted_scores(train, validation, gains, config.seed)
        loss = float(np.mean(validation.losses, dtype=np.float64))
        return {
            "command": command_line(),
            "environment": environment("fp32"),
            "hard_ratio": config.hard_ratio,
            "seed": config.seed,
            "run": None if run is None or gains is None else describe_gains(run, gains),
            "base": base_results(base, loss, perplexity(loss)),
            "data": data.summary(),
            "criteria": criteria_rows(
                scores, validation.losses, gains, config.hard_ratio, costs=criterion_costs(base.model.config)
            ),
            **results_footer(clock.seconds()),
        }


def restore_design_run(run_dir: str | Path, settings: Mapping[str, Any]) -> DesignRun:
    """A run whose tokens have gains.

    Raises:
      InputError: a run of another system, of the published design, or one that is not finished; or settings that are
        the run's own.
    """
    run = RunDir.open(run_dir)
    wanted = "give a cascade run with another design (entry_layer or skipped_layers, for instance), or no run"
    system = run.description.get("system")
    if system != CascadeConfig.system:
        raise InputError(f"{run.path}: is a run of {shown(system)}; {wanted}")
    config = stored_config(run, CascadeConfig)
    if config.has_published_design:
        raise InputError(f"{run.path}: is a cascade run of the published design; {wanted}")
    for name in settings:
        if name not in RUN_SETTINGS:
            raise InputError(f"{name}: does not go with a run, whose own base and data are measured")
    base = load_base(config)
    check_fingerprints(run, fingerprints(base))
    return restore_design(run, config, base)


def read_base(base: SmolLM2, params: Params, chunks: np.ndarray, advance: Advance = lambda chunks: None) -> BaseTokens:
    """One pass of a base over chunks `[chunks, 129]`, with the scores of all criteria that need no training."""
    tokens, width = chunks[:, 1:].shape, base.config.hidden_size
    states, batches = States(width, spare_folder(chunks[:, 1:].size, width)), list[list[np.ndarray]]()
    for hidden, *scalars in each_batch(partial(_read_base, base, params), params, chunks, advance=advance):
        states.append(hidden.reshape(-1, width))
        batches.append(scalars)
    losses, *scores = map(np.concatenate, zip(*batches, strict=True))
    return BaseTokens(states.array().reshape(*tokens, width), losses, dict(zip(SINGLE_PASS, scores, strict=True)))


@partial(jax.jit, static_argnums=0)
def _read_base(base: SmolLM2, params: Params, ids: jax.Array) -> tuple[jax.Array, ...]:
    states: Any = base.apply({"params": params}, ids[:, :-1], method="hidden")
    logits: Any = base.apply({"params": params}, states.last, method="logits")
    scores = (token_scores(criterion, states.embedding, states.last, logits) for criterion in SINGLE_PASS)
    return states.last, token_losses(logits, ids[:, 1:])[0], *scores


def measure_gains(run: DesignRun, data: AlpacaChunks) -> Gains:
    """The gains of a run on its train and validation chunks."""
    easy, hard = both_paths(run.trained, data.train)
    train = easy.losses - hard.losses
    easy, hard = both_paths(run.trained, data.validation)
    return Gains(train, easy.losses - hard.losses, easy.mean, hard.mean)


def fitted_scores(train: BaseTokens, validation: BaseTokens, gains: Gains | None, seed: int) -> dict[str, np.ndarray]:
    """The scores `[chunks, 128]` of validation tokens that are no function of one pass: probe, oracle, random.

    The probe reads the base's last hidden states. It is trained on the gains of the train tokens where there are some,
    as that of a run is, else on the base's losses.
    """
    target, largest = (train.losses, math.inf) if gains is None else (gains.train, LARGEST_GAIN)
    probe = train_probe(train.hidden.reshape(target.size, -1), target.ravel(), seed, largest)
    predicted = in_batches(partial(_predict, probe), probe, validation.hidden)[0]
    random = np.random.default_rng(seed).random(validation.losses.shape, np.float32)
    return {"probe": -predicted, "oracle": -validation.losses, "random": random}


@jax.jit
def _predict(probe: Params, hidden: jax.Array) -> tuple[jax.Array]:
    return (probe_gains(probe, hidden),)


def criterion_costs(llama: LlamaConfig) -> dict[str, float | None]:
    """What a criterion costs beside the layers of the base, in passes of the base; None where it cannot be computed."""
    cost = Costs.from_config(llama)
    head, probe = cost.head / cost.base, probe_cost(llama) / cost.base
    with_head = dict.fromkeys(("entropy", "max_probability", "margin"), head)
    return {"cosine": 0.0, **with_head, "probe": probe, "oracle": None, "random": 0.0}


def criteria_rows(
    scores: Mapping[str, np.ndarray],
    losses: np.ndarray,
    gains: Gains | None,
    hard_ratio: float,
    costs: Mapping[str, float | None],
) -> list[dict[str, Any]]:
    """A row for each criterion, from the scores and losses of tokens, all of one shape.

    `hard_tokens`: those at or below the `hard_ratio` quantile of the scores; of a part without tokens the PPL is None.
    """
    rows = []
    for name, each in scores.items():
        hard = is_hard(each, hardness_threshold(each, hard_ratio))
        rows.append({
            "criterion": name,
            "target": None if name != "probe" else ("loss" if gains is None else "gain"),
            "loss_correlation": rank_correlation(-each, losses),
            "gain_correlation": None if gains is None else rank_correlation(-each, gains.validation),
            "hard_tokens": int(hard.sum()),
            "hard_ppl": _part_ppl(losses[hard]),
            "easy_ppl": _part_ppl(losses[~hard]),
            "cost": costs[name],
        })  # fmt: skip
    return rows


def _part_ppl(losses: np.ndarray) -> float | None:
    return perplexity(float(np.mean(losses, dtype=np.float64))) if losses.size else None


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's correlation of two arrays of one shape: that of their ranks; None where one of them is constant."""
    ranks = [average_ranks(each) for each in (first, second)]
    x, y = (each - each.mean() for each in ranks)
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else None


def average_ranks(values: np.ndarray) -> np.ndarray:
    """The ranks from 1 of all values, `[values]`; equal ones share the mean of theirs."""
    _, places, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places.ravel()]


def describe_gains(run: DesignRun, gains: Gains) -> dict[str, Any]:
    """The `run` of the results: which it is, and both its paths over all validation tokens."""
    return {
        "name": run.run.path.name,
        "config": run.config.to_dict(),
        "easy_loss": gains.easy_loss,
        "hard_loss": gains.hard_loss,
        "mean_gain": gains.easy_loss - gains.hard_loss,
    }


def _narrate(
    narrate: Narrate, base: Pretrained, data: AlpacaChunks, config: CascadeConfig, run: DesignRun | None
) -> None:  # fmt: skip
    """Tells what was resolved."""
    facts = source_facts(base, data)
    if run is not None:
        facts["gain"] = f"on the hard path of {run.run.path}"
    narrate_facts(narrate, "fp32", facts, source_warnings(base, data, config))
