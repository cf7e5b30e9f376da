"""Training of one stage on the hard tokens of what came before it, resumed where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from newllm_jax.bars import progress_bar
from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.extraction import Tokens, run_stage
from newllm_jax.cascade.hardness import hardness_threshold, select_hard
from newllm_jax.cascade.run import begun_stages, chosen_epoch, stage_folder, stage_owner
from newllm_jax.cascade.stage.model import init_stage
from newllm_jax.cascade.stage.updates import StageTraining
from newllm_jax.cascade.states import release
from newllm_jax.config import Examples
from newllm_jax.errors import NumericalError
from newllm_jax.processes import is_first
from newllm_jax.records.directory import RunDir
from newllm_jax.records.narration import Narrate
from newllm_jax.records.progress import TrainingProgress
from newllm_jax.records.trackers import open_tracker
from newllm_jax.training.checkpoint import Checkpoints, every_few_epochs
from newllm_jax.training.feed import stays_in_files
from newllm_jax.training.history import History, at_epoch, best_epoch, is_finished, stopped_early
from newllm_jax.training.loop import fit
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.split import Split
from newllm_jax.training.step import init_state
from newllm_jax.training.stopping import Stopping

SPLITS = ("train", "validation")
TokenSplits = dict[str, Tokens]


@dataclass(frozen=True)
class FinishedStage:
    """A stage that was trained.

    Attributes:
      trained: its weights that go on, and the threshold of its hard tokens.
      entry: what `results.json` says of its training.
      hard: by split the hard tokens that it was trained on: outputs of the model before it; none once handed on.
    """

    trained: TrainedStage
    entry: dict[str, Any]
    hard: TokenSplits

    @property
    def counts(self) -> dict[str, int]:
        """By split the number of its hard tokens."""
        return {"train": self.entry["train_tokens"], "validation": self.entry["val_tokens"]}


def train_stage(
    shared: StageTraining,
    run: RunDir,
    tokens: TokenSplits,
    earlier: Sequence[FinishedStage],
    stopping: Stopping,
    narrate: Narrate,
) -> FinishedStage:
    """Trains the next stage on the hard tokens among `tokens`, or continues its training.

    Args:
      tokens: by split, outputs of the model before this stage.
      earlier: the stages before it.

    Raises:
      NumericalError: a loss or gradient that is not finite; the stages before it are kept.
    """
    config, number = shared.config, len(earlier) + 1
    # While training, validation has its own threshold; the ensemble will use that of the train tokens.
    thresholds = {split: hardness_threshold(tokens[split].scores, config.hard_ratio) for split in SPLITS}
    hard = {split: tokens[split].take(select_hard(tokens[split].scores, thresholds[split])) for split in SPLITS}
    counts = {split: f"{len(hard[split]):,} of {len(tokens[split]):,}" for split in SPLITS}
    narrate(f"stage {number}     threshold {thresholds['train']:.4f}: {counts['train']} train tokens, "
            f"{counts['validation']} validation tokens")  # fmt: skip

    state = init_state(
        init_stage(shared.stage, config.seed, number), shared.optimizer, initial_loss_scale(shared.stage.precision)
    )
    owner, chosen_of = stage_owner(run, [stage.trained for stage in earlier]), partial(chosen_epoch, config=config)
    with Checkpoints(stage_folder(run, number), owner, every_few_epochs(config.checkpoint_every)) as checkpoints:
        state, history = checkpoints.resume(state, config, stopping.clock, narrate, chosen_of)
        before = _numbered([stage.entry["epochs"] for stage in earlier])
        run.write_metrics([*before, *_numbered([history], number)])
        if not is_finished(history, config):
            _delete_later_stages(run, number)
            # All stages run the programs that are compiled for the first, which has the most tokens.
            rooms = earlier[0].counts if earlier else {split: len(hard[split]) for split in SPLITS}
            splits = {split: hard_split(hard[split], rooms[split], config.examples) for split in SPLITS}
            tracker = open_tracker(config.tracker, run, config.to_dict())
            with TrainingProgress(
                run, tracker, config.num_epochs, history, stage=number, epochs_before=len(before), narrate=narrate
            ) as progress:
                try:
                    state, history = fit(
                        shared.training, state, splits, config, checkpoints, progress, stopping, history,
                        {"threshold": thresholds["train"]},
                    )  # fmt: skip
                except NumericalError as error:
                    raise NumericalError(f"stage {number}, {error}") from error
        chosen = chosen_epoch(history, config)
        checkpoints.keep_only({best_epoch(history), len(history) - 1, len(history)})  # of the latest two one may break
        params = state.params if chosen == len(history) else checkpoints.params(chosen, state.params)
    trained = TrainedStage(jax.device_get(params), thresholds["train"])
    return FinishedStage(trained, _entry(number, thresholds, hard, history, shared), hard)


def hand_on(shared: StageTraining, number: int, finished: FinishedStage, stopping: Stopping) -> TokenSplits:
    """The outputs of stage `number` for its hard tokens."""
    with progress_bar(f"stage {number}: hidden states", sum(map(len, finished.hard.values()))) as advance:
        params = shared.training.mesh.place(jax.device_put(finished.trained.params))
        advance = stopping.between("hidden states", advance)
        return {
            split: run_stage(shared.strict, params, tokens, shared.config.criterion, advance)
            for split, tokens in finished.hard.items()
        }


def hard_split(tokens: Tokens, room: int, examples: Examples) -> Split:
    """Hidden states and targets where the setting says: on the device, with room for `room` tokens, or in files."""
    arrays = tokens.hidden, tokens.targets
    if stays_in_files(examples, room * sum(array[:1].nbytes for array in arrays)):
        return Split.from_file(arrays)
    split = on_device(tokens, room)
    release(tokens.hidden)
    return split


def on_device(tokens: Tokens, room: int) -> Split:
    """Hidden states and targets on the device, with room for `room` tokens."""
    missing = room - len(tokens)
    arrays = np.pad(tokens.hidden, [(0, missing), (0, 0)]), np.pad(tokens.targets, (0, missing))
    return Split(Split.from_arrays(arrays).data, len(tokens))


def _delete_later_stages(run: RunDir, number: int) -> None:
    """They were trained on other weights than those that stage `number` will have."""
    for later in begun_stages(run) if is_first() else ():
        if later > number:
            shutil.rmtree(stage_folder(run, later), ignore_errors=True)


def _numbered(histories: Sequence[History], first: int = 1) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` of several stages."""
    return [{"stage": stage, **entry} for stage, history in enumerate(histories, first) for entry in history]


def _entry(
    number: int, thresholds: dict[str, float], hard: TokenSplits, history: History, shared: StageTraining
) -> dict[str, Any]:  # fmt: skip
    """What `results.json` says of the training of a stage."""
    return {
        "stage": number,
        "threshold": thresholds["train"],
        "val_threshold": thresholds["validation"],
        "train_tokens": len(hard["train"]),
        "val_tokens": len(hard["validation"]),
        "epochs": history,
        "stopped": "early" if stopped_early(history, shared.config) else "after num_epochs",
        "last": at_epoch(history, len(history)),
        "best": at_epoch(history, best_epoch(history)),
        "seconds": sum(entry["seconds"] for entry in history),
    }
