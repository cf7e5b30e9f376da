"""A CASCADE run on disk: where its stages lie, which of their weights go on, and its models given back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.config import CascadeConfig
from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir
from newllm_jax.records.results import check_fingerprints
from newllm_jax.records.stored_config import stored_config
from newllm_jax.smollm.base import fingerprints, load_base
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.smollm.tokenizer import Tokenizer
from newllm_jax.training.history import History, best_epoch, is_finished


@dataclass(frozen=True)
class CascadeRun:
    """A frozen base and the stages trained on it, ready to call.

    Attributes:
      base: the base model, its parameters (NumPy) and where they came from.
      stage: the architecture of all stages: `run.stage.apply({"params": run.stages[0].params}, hidden)`.
      stages: parameters and threshold of each, in order.
      config: of the run.
      run: its directory.
    """

    base: Pretrained
    stage: Stage
    stages: tuple[TrainedStage, ...]
    config: CascadeConfig
    run: RunDir

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the base."""
        return self.base.tokenizer


def stage_folder(run: RunDir, number: int) -> Path:
    """The folder of the checkpoints of stage `number` (from 1)."""
    return run.checkpoints / f"stage_{number}"


def chosen_epoch(history: History, config: CascadeConfig) -> int:
    """The epoch whose weights go on to the next stage and to the ensemble."""
    return len(history) if config.stage_weights == "last" else best_epoch(history)


def restore_cascade(run_dir: str | Path) -> CascadeRun:
    """The base and the finished stages of a run, each with the weights that went on. Changes nothing on disk.

    Raises:
      InputError: not a CASCADE run, one without a finished stage, or a base that cannot be had.
    """
    from newllm_jax.training.checkpoint import Checkpoints

    run = RunDir.open(run_dir)
    config = stored_config(run, CascadeConfig)
    base = load_base(config)
    check_fingerprints(run, fingerprints(base))
    stage = Stage(stage_config(base.model.config, config.stage_layers))
    like = jax.eval_shape(lambda: init_stage(stage, config.seed, 1))
    stages = []
    for number in range(1, config.num_stages + 1):
        if not stage_folder(run, number).is_dir():
            break
        with Checkpoints(stage_folder(run, number), read_only=True) as checkpoints:
            if not checkpoints.epochs:
                break
            record = checkpoints.record()
            if not is_finished(record["history"], config):
                break
            epoch = chosen_epoch(record["history"], config)
            stages.append(TrainedStage(checkpoints.params(epoch, like), record["threshold"]))
    if not stages:
        raise InputError(f"{run.path}: has no trained stage yet; cascade.py --resume {run.path} continues it")
    return CascadeRun(base, stage, tuple(stages), config, run)
