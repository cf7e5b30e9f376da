"""A New-LLM run on disk: what it was started with, what resuming may change, and its model given back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.wikitext import Wikitext, WordTokenizer
from newllm_jax.records.directory import RunDir
from newllm_jax.records.stored_config import resumed_config, stored_config
from newllm_jax.training.history import best_epoch
from newllm_jax.training.step import Params

SYSTEM = "new-llm"
RESUMABLE = {"num_epochs", "patience", "checkpoint_every", "tracker", "dataset", "dataset_config", "fallback"}


@dataclass(frozen=True)
class NewLLMRun:
    """A trained model, ready to call: `run.model.apply({"params": run.params}, ids, context)`.

    Attributes:
      model, params: the model and its best parameters.
      config, tokenizer: of the run.
      epoch: the epoch that the parameters are from.
      fingerprint: of the texts that it was trained on.
    """

    model: ContextVectorLM
    params: Params
    config: NewLLMConfig
    tokenizer: WordTokenizer
    epoch: int
    fingerprint: str


def init_params(model: ContextVectorLM, seed: int) -> Params:
    """The initial parameters of a seed."""
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]


def restore_newllm(run_dir: str | Path) -> NewLLMRun:
    """The best parameters of a run and its model (strict float32), on the default device. Changes nothing on disk.

    Raises:
      InputError: not a New-LLM run, or one without a checkpoint that can be read.
    """
    from newllm_jax.training.checkpoint import Checkpoints

    run = RunDir.open(run_dir)
    config = stored_config(run, SYSTEM, NewLLMConfig)
    tokenizer = WordTokenizer(tuple(run.read_json("vocabulary.json")))
    model = ContextVectorLM.from_config(config, len(tokenizer))
    like = jax.eval_shape(lambda: init_params(model, config.seed))
    if not run.checkpoints.is_dir():
        raise InputError(f"{run.path}: has no checkpoint yet")
    with Checkpoints(run.checkpoints, read_only=True) as checkpoints:
        record = checkpoints.record()
        epoch = best_epoch([entry["val_loss"] for entry in record["history"]])
        return NewLLMRun(model, checkpoints.params(epoch, like), config, tokenizer, epoch, record["fingerprint"])


def resumed_newllm_config(run: RunDir, overrides: Mapping[str, Any]) -> NewLLMConfig:
    """The configuration of a run with what resuming may change.

    Raises:
      InputError: an override that would make it another experiment; the field and both values are named.
    """
    stored = stored_config(run, SYSTEM, NewLLMConfig)
    asked = resumed_config(run, SYSTEM, NewLLMConfig, overrides, RESUMABLE)
    if asked.num_epochs != stored.num_epochs and stored.schedule == "cosine" and stored.decay_epochs is None:
        raise InputError(
            f"num_epochs: the learning rate of {run.path} decays over its {stored.num_epochs} epochs, so it cannot "
            f"become {asked.num_epochs}; a new run with decay_epochs set could be extended"
        )
    return asked


def check_same_data(before: str, data: Wikitext) -> None:
    """Raises InputError where the fingerprint that a run began with is not that of the texts at hand."""
    now = data.provenance["fingerprint"]
    if before != now:
        raise InputError(
            f"dataset: {data.provenance['source']} is not what the run was trained on "
            f"(fingerprint {before[:12]}, now {now[:12]})"
        )
