"""What trains New-LLM: its model, compiled functions, optimiser and schedules, from the settings."""

from __future__ import annotations

from functools import partial

import optax

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.loss import next_word_loss
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.recurrence.scan import fusible, loops_for
from newllm_jax.training.loop import Trainer
from newllm_jax.training.optimizer import clipped_adam, clipping_schedule, learning_rate_schedule
from newllm_jax.training.precision import PRECISIONS, resolve_precision, supported_precisions
from newllm_jax.training.step import make_evaluation, make_updates, train_step


def training_precision(config: NewLLMConfig) -> str:
    """The precision that a configuration is trained in: `auto` takes bf16 where the time loops are GPU kernels.

    There it is the fastest, and training ends no worse than in tf32 (docs/results); in loops of separate kernels it
    gains nothing.

    Raises:
      InputError: a precision that the default device does not have.
    """
    if config.precision == "auto" and "bf16" in supported_precisions() and fusible(config, "bf16"):
        return "bf16"
    return resolve_precision(config.precision)


def training_model(config: NewLLMConfig, vocabulary_size: int, precision: str) -> ContextVectorLM:
    """The model of a configuration as it is trained, in a resolved precision."""
    model = ContextVectorLM.from_config(config, vocabulary_size, PRECISIONS[precision])
    return model.clone(loops=loops_for(config, precision))


def build(
    config: NewLLMConfig, model: ContextVectorLM, steps_per_epoch: int
) -> tuple[Trainer, optax.GradientTransformation]:
    """The compiled functions of a run, and its optimiser. Evaluation is strict float32 whatever training is."""
    horizon = (config.decay_epochs or config.num_epochs) * steps_per_epoch
    rate = learning_rate_schedule(config.schedule, config.learning_rate, config.warmup_steps, horizon)
    clip = clipping_schedule(config.clip_norms, config.clip_epochs, steps_per_epoch)
    optimizer = clipped_adam(rate, clip)
    strict = training_model(config, model.vocabulary_size, "fp32")
    updates = make_updates(partial(train_step, next_word_loss(model), optimizer))
    return Trainer(updates, make_evaluation(next_word_loss(strict)), rate, clip), optimizer
