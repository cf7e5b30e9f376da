"""The CASCADE experiment with a design other than the published one: a frozen base, one stage or skipped layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from newllm_jax.bars import progress_bar
from newllm_jax.cascade.ensemble import best_ensemble, ensemble_rows
from newllm_jax.cascade.example import exit_example
from newllm_jax.cascade.paths import (
    Routing,
    TokenLosses,
    TrainedDesign,
    base_losses,
    build_routing,
    hard_tokens,
    hidden_moment,
    routed_losses,
    token_path_scores,
)
from newllm_jax.cascade.run import (
    DesignRun,
    chosen_epoch,
    extraction_folder,
    stage_folder,
    stage_owner,
    write_routing,
)
from newllm_jax.cascade.stage.design_training import build_design_training
from newllm_jax.cascade.stage.designs import AnyDesign, build_design
from newllm_jax.config import CascadeConfig, Criterion, Precision
from newllm_jax.processes import are_several, host_copies
from newllm_jax.records.directory import RunDir
from newllm_jax.records.narration import Narrate
from newllm_jax.records.progress import TrainingProgress
from newllm_jax.records.trackers import open_tracker
from newllm_jax.smollm.alpaca import AlpacaChunks
from newllm_jax.smollm.base import base_results
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.training.checkpoint import Checkpoints, every_few_epochs
from newllm_jax.training.feed import make_split
from newllm_jax.training.history import History, at_epoch, best_epoch, stopped_early
from newllm_jax.training.loop import fit
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.mesh import ONE_DEVICE, DeviceMesh, choose_mesh
from newllm_jax.training.step import Params, count_parameters, init_state, place_state
from newllm_jax.training.stopping import Stopping

MOMENT_CHUNKS = 200  # that short heads are fitted to


@dataclass(frozen=True)
class DesignSetting:
    """What the parts of the experiment share.

    Attributes:
      config: of the run.
      base: the frozen base; its parameters on the device are `params`.
      data: the chunks.
      design: in the precision of training; `strict` in strict float32.
    """

    config: CascadeConfig
    base: Pretrained
    params: Params
    data: AlpacaChunks
    design: AnyDesign
    strict: AnyDesign


def train_design(
    run: RunDir,
    config: CascadeConfig,
    base: Pretrained,
    data: AlpacaChunks,
    precision: Precision,
    stopping: Stopping,
    narrate: Narrate,
) -> dict[str, Any]:
    """Trains a design, sets its threshold and measures it beside the base: the entries of `results.json`."""
    build = partial(build_design, config, base.model)
    params = measuring_mesh(config).place(jax.device_put(base.params))
    setting = DesignSetting(config, base, params, data, build(precision), build("fp32"))
    ranks, alone = read_ranks(setting, stopping)
    narrate(f"base        validation loss {alone.mean:.4f}, PPL {np.exp(alone.mean):.2f} over all tokens")
    params, history, size = train_paths(setting, run, ranks, stopping, narrate)
    with progress_bar("paths", 0):
        trained = TrainedDesign(setting.strict, setting.params, params)
        folder = extraction_folder(run)
        routing = build_routing(trained, base.model, data.train, data.threshold_chunks, config, folder)
        measured, hard = measure(setting, trained, routing, data.validation, alone, size)
        best = best_ensemble(measured) if config.kept_stages == "best" else 1
        write_routing(run, routing, best, params)
        results = {
            "base": base_results(base, measured[0]["val_loss"], measured[0]["val_ppl"]),
            "stages": [describe_stage(setting, history, routing, ranks, measured, size)],
            "ensemble": measured,
            "kept_stages": best,
            **exit_example(base.tokenizer, data.validation, hard.astype(int), config.sample_words),
        }
        if len(data.test):
            on_test = base_losses(base.model, setting.params, data.test, "entropy")[0]
            rows, _ = measure(setting, trained, routing, data.test, on_test, size)
            results["test"] = [
                {"stages": row["stages"], "loss": row["val_loss"], "ppl": row["val_ppl"], "flops": row["flops"]}
                for row in rows
            ]
    return results


def measuring_mesh(config: CascadeConfig) -> DeviceMesh:
    """The devices that measure base and design: those of the training; of several processes one device of each."""
    return ONE_DEVICE if are_several() else choose_mesh(config.mesh, config.examples_at_once)


def score_before_training(config: CascadeConfig) -> Criterion:
    """The criterion that ranks tokens while a design is trained: entropy for a probe, which does not exist by then."""
    return "entropy" if config.criterion == "probe" else config.criterion


def read_ranks(setting: DesignSetting, stopping: Stopping) -> tuple[dict[str, np.ndarray], TokenLosses]:
    """By split the rank of each token, see `design_training`, and the losses of the base on the validation chunks."""
    criterion, data = score_before_training(setting.config), setting.data
    with progress_bar("base: scores", len(data.train) + len(data.validation)) as advance:
        read = partial(base_losses, setting.base.model, setting.params, criterion=criterion,
                       advance=stopping.between("base", advance))  # fmt: skip
        _, scores = read(data.train)
        alone, held_out = read(data.validation)
    ordered = np.sort(scores, axis=None)
    ranks = {
        split: (np.searchsorted(ordered, each) / len(ordered)).astype(np.float32)
        for split, each in {"train": scores, "validation": held_out}.items()
    }
    return ranks, alone


def train_paths(
    setting: DesignSetting, run: RunDir, ranks: dict[str, np.ndarray], stopping: Stopping, narrate: Narrate
) -> tuple[Params, History, int]:
    """Trains, or continues; the parameters of the epoch that is chosen, the history, and the number of parameters."""
    config, data = setting.config, setting.data
    training, optimizer = build_design_training(setting.design, setting.strict, setting.params)
    sample = data.train[: MOMENT_CHUNKS if config.short_head else 0]
    moment = hidden_moment(setting.base.model, setting.params, sample)
    initial = jax.jit(setting.design.init, static_argnums=1)(setting.params, config.seed, moment)
    scale = initial_loss_scale(setting.design.base.precision)
    state = init_state(initial, optimizer, scale, mesh=training.mesh)
    size = count_parameters(state.params)
    narrate(f"trained     {size:,} parameters")
    choose = partial(chosen_epoch, config=config)
    owner = stage_owner(run, [])
    with Checkpoints(stage_folder(run, 1), owner, every_few_epochs(config.checkpoint_every)) as checkpoints:
        state, history = checkpoints.resume(state, config, stopping.clock, narrate, choose)
        state = place_state(training.mesh, state)
        run.write_metrics([{"stage": 1, **entry} for entry in history])
        splits = {
            "train": make_split((data.train, ranks["train"]), config.examples),
            "validation": make_split((data.validation, ranks["validation"]), config.examples),
        }
        tracker = open_tracker(config.tracker, run, config.to_dict())
        with TrainingProgress(run, tracker, config.num_epochs, history, stage=1, narrate=narrate) as progress:
            state, history = fit(training, state, splits, config, checkpoints, progress, stopping, history)
        chosen = choose(history)
        checkpoints.keep_only({best_epoch(history), len(history) - 1, len(history)})
        params = state.params if chosen == len(history) else checkpoints.params(chosen, state.params)
    return measuring_mesh(config).place(jax.device_put(host_copies(params))), history, size


def measure(
    setting: DesignSetting,
    trained: TrainedDesign,
    routing: Routing,
    chunks: np.ndarray,
    alone: TokenLosses,
    size: int,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The base, and the design with its threshold, over all tokens of a split.

    Returns:
      Rows of `ensemble_rows`, with FLOPs; and which tokens are hard, `[chunks, 128]`.
    """
    scores = token_path_scores(trained, setting.base.model, routing.probe, chunks)
    hard = hard_tokens(scores, routing.threshold)
    routed = routed_losses(trained, chunks, hard)
    losses = np.stack([alone.losses.ravel(), routed.losses.ravel()])
    hits = np.stack([alone.hits.ravel(), routed.hits.ravel()])
    count = count_parameters(setting.base.params)
    rows = ensemble_rows(losses, hits, hard.ravel().astype(np.int32), [count, count + size])
    costs = setting.design.costs(setting.base.model.config)
    flops = [1.0, costs.mean(float(hard.mean()))]
    return [{**row, "flops": each} for row, each in zip(rows, flops, strict=True)], hard


def measure_again(run: DesignRun, data: AlpacaChunks) -> list[dict[str, Any]]:
    """The rows of `measure` of a restored run on its validation chunks."""
    design, params = run.trained.design, run.trained.base
    setting = DesignSetting(run.config, run.base, params, data, design, design)
    with progress_bar("paths", 0):
        alone, _ = base_losses(run.base.model, params, data.validation, score_before_training(run.config))
        size = count_parameters(run.trained.params)
        return measure(setting, run.trained, run.routing, data.validation, alone, size)[0]


def describe_stage(
    setting: DesignSetting,
    history: History,
    routing: Routing,
    ranks: dict[str, np.ndarray],
    measured: list[dict[str, Any]],
    size: int,
) -> dict[str, Any]:
    """The stage as `results.json` has it."""
    config, layers = setting.config, setting.base.model.config.num_layers
    added = 0 if config.skipped_layers else setting.strict.model.config.num_layers  # type: ignore[union-attr]
    all_tokens = config.trained_on == "all" or bool(config.skipped_layers)
    train = ranks["train"].size if all_tokens else int((ranks["train"] <= config.hard_ratio).sum())
    return {
        "stage": 1,
        "added_layers": added,
        "total_layers": layers + added,
        "stage_parameters": size,
        "total_parameters": measured[1]["parameters"],
        "criterion": config.criterion,
        "hard_ratio": config.hard_ratio,
        "threshold": routing.threshold,
        "train_tokens": train,
        "val_tokens": measured[1]["exit_groups"][1]["tokens"],
        "epochs": [*history],
        "stopped": "early" if stopped_early(history, config) else "after num_epochs",
        "last": at_epoch(history, len(history)),
        "best": at_epoch(history, best_epoch(history)),
        "seconds": sum(entry["seconds"] for entry in history),
        "path_flops": vars(setting.design.costs(setting.base.model.config)),
    }
