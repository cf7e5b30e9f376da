"""The compiled updates and evaluation of fine-tuning, and its optimiser, from the settings."""

from __future__ import annotations

from functools import partial

import optax

from newllm_jax.config import FinetuneConfig, Precision
from newllm_jax.finetuning.loss import sequence_loss
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.loop import Training
from newllm_jax.training.optimizer import adamw
from newllm_jax.training.step import make_evaluation, make_updates, train_step


def build_training(
    config: FinetuneConfig, model: SmolLM2, precision: Precision
) -> tuple[Training, optax.GradientTransformation]:
    """The compiled functions of a run, and its optimiser. Evaluation is strict float32 whatever training is."""
    optimizer, loss = adamw(config.learning_rate, config.weight_decay), sequence_loss(model.clone(precision=precision))
    updates = make_updates(partial(train_step, loss, optimizer, micro_batch=config.micro_batch))
    rate = optax.constant_schedule(config.learning_rate)
    return Training(updates, make_evaluation(sequence_loss(model)), rate, None, precision), optimizer
