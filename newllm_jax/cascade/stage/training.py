"""Stage after stage: each trained on the hard tokens of the one before, resumed where it stopped."""

from __future__ import annotations

import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.extraction import Tokens, run_stage
from newllm_jax.cascade.hardness import hardness_threshold, select_hard
from newllm_jax.cascade.run import Narrate, at_epoch, chosen_epoch, is_trained, stage_folder
from newllm_jax.cascade.stage.model import Stage, init_stage
from newllm_jax.cascade.stage.updates import next_token_loss, stage_updates
from newllm_jax.config import CascadeConfig
from newllm_jax.records.directory import RunDir
from newllm_jax.records.progress import TrainingProgress, progress_bar
from newllm_jax.records.trackers import open_tracker
from newllm_jax.training.checkpoint import Checkpoints
from newllm_jax.training.history import best_epoch
from newllm_jax.training.loop import Trainer, fit, stopped_early
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.optimizer import adamw
from newllm_jax.training.precision import PRECISIONS
from newllm_jax.training.step import init_state, make_evaluation

SPLITS = ("train", "validation")


class StageTrainer:
    """Trains one stage after another and keeps what the results say of each."""

    def __init__(
        self, stage: Stage, config: CascadeConfig, precision: str, run: RunDir, narrate: Narrate, started: float
    ) -> None:
        self.stage, self.config, self.precision = stage, config, precision
        self.run, self.narrate, self.started = run, narrate, started
        self.strict = stage.clone(precision=PRECISIONS["fp32"])
        self.optimizer = adamw(config.learning_rate, config.weight_decay)
        self.trainer = Trainer(
            stage_updates(stage, config, self.optimizer, precision),
            make_evaluation(next_token_loss(self.strict)),
            optax.constant_schedule(config.learning_rate),
            None,
        )
        self.stages: list[TrainedStage] = []
        self.reports: list[dict[str, Any]] = []
        self.seconds_before = 0.0
        self.room: dict[str, int] = {}  # the tokens of the first stage: all stages run the programs compiled for it

    def seconds(self) -> float:
        """Of the run so far, those before a resumption included."""
        return self.seconds_before + time.monotonic() - self.started

    def train_stage(self, number: int, tokens: dict[str, Tokens]) -> dict[str, Tokens]:
        """Trains stage `number` on the hard ones of the tokens that its predecessor left, or goes on with it.

        Returns:
          The hard tokens of each split as the stage leaves them.
        """
        config = self.config
        # Validation picks its own share while training; the ensemble will use the threshold of the train tokens.
        thresholds = {split: hardness_threshold(tokens[split].scores, config.hard_ratio) for split in SPLITS}
        hard = {split: tokens[split].take(select_hard(tokens[split].scores, thresholds[split])) for split in SPLITS}
        counts = {split: f"{len(hard[split]):,} of {len(tokens[split]):,}" for split in SPLITS}
        self.narrate(f"stage {number}     threshold {thresholds['train']:.4f}: {counts['train']} train tokens, "
                     f"{counts['validation']} validation tokens")  # fmt: skip
        params, scale = init_stage(self.stage, config.seed, number), initial_loss_scale(self.precision)
        state = init_state(params, self.optimizer, scale)
        epochs_before = [{"stage": report["stage"], **entry} for report in self.reports for entry in report["epochs"]]
        with Checkpoints(stage_folder(self.run, number), config.checkpoint_every) as checkpoints:
            found, damaged = checkpoints.latest(state)
            if damaged:
                self.narrate(f"damaged, and passed over: the checkpoints of stage {number}, epochs {damaged}")
            history: list[dict[str, Any]] = []
            if found:
                state, history = found.state, found.record["history"]
                self.seconds_before = max(self.seconds_before, found.record["seconds"])
                checkpoints.drop_after(found.epoch)
                self.narrate(f"stage {number}     going on after epoch {found.epoch}")
            self.run.write_metrics([*epochs_before, *({"stage": number, **entry} for entry in history)])
            if not self.room:
                self.room = {split: len(hard[split]) for split in SPLITS}
            data = {split: on_device(hard[split], self.room[split]) for split in SPLITS}

            def remember() -> dict[str, Any]:
                return {"threshold": thresholds["train"], "seconds": self.seconds()}

            if not is_trained(history, config):
                for folder in self.run.checkpoints.glob("stage_*"):
                    if int(folder.name.removeprefix("stage_")) > number:  # trained on other weights than this stage's
                        shutil.rmtree(folder, ignore_errors=True)
                tracker = open_tracker(config.tracker, self.run, config.to_dict())
                with TrainingProgress(
                    self.run, tracker, config.num_epochs, history, stage=number, epochs_before=len(epochs_before)
                ) as progress:
                    state, history = fit(
                        self.trainer, state, data["train"], data["validation"], config, checkpoints, progress, history,
                        remember,
                    )  # fmt: skip
                checkpoints.wait()
            best, chosen = best_epoch([entry["val_loss"] for entry in history]), chosen_epoch(history, config)
            checkpoints.keep_only({best, len(history)})
            params = state.params if chosen == len(history) else checkpoints.params(chosen, state.params)
        del state, data
        self.stages.append(TrainedStage(jax.device_get(params), thresholds["train"]))
        self.reports.append({
            "stage": number,
            "threshold": thresholds["train"],
            "val_threshold": thresholds["validation"],
            "train_tokens": len(hard["train"]),
            "val_tokens": len(hard["validation"]),
            "epochs": history,
            "stopped": "early" if stopped_early(history, config) else "after num_epochs",
            "last": at_epoch(history, len(history)),
            "best": at_epoch(history, best),
            "seconds": sum(entry["seconds"] for entry in history),
        })  # fmt: skip
        if number == config.num_stages:
            return hard
        total = sum(map(len, hard.values()))
        with progress_bar(f"stage {number}: hidden states", total) as advance:
            return {split: run_stage(self.strict, params, hard[split], config.criterion, advance) for split in SPLITS}


def on_device(tokens: Tokens, room: int) -> tuple[tuple[jax.Array, jax.Array], int]:
    """A split as `fit` takes it: `(hidden, targets)` on the device, with room for `room` tokens, and its length."""
    missing = room - len(tokens)
    hidden = np.pad(tokens.hidden, [(0, missing), (0, 0)])
    return (jnp.asarray(hidden), jnp.asarray(np.pad(tokens.targets, (0, missing)))), len(tokens)
