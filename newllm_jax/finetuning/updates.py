"""The compiled updates and evaluation of fine-tuning, and its optimiser, from the settings."""

from __future__ import annotations

from functools import partial

import optax

from newllm_jax.config import FinetuneConfig, Precision
from newllm_jax.finetuning.adaptation import Adaptation
from newllm_jax.finetuning.loss import adapted_loss
from newllm_jax.training.loop import Training
from newllm_jax.training.mesh import choose_mesh
from newllm_jax.training.optimizer import adamw
from newllm_jax.training.step import Params, StepFn, make_frozen_evaluation, make_frozen_updates, train_step


def build_training(
    config: FinetuneConfig, adaptation: Adaptation, frozen: Params, precision: Precision
) -> tuple[Training, optax.GradientTransformation]:
    """The compiled functions of a run, and its optimiser. Evaluation is strict float32 whatever training is.

    Args:
      frozen: the frozen parameters; shapes will do where nothing is computed.
    """
    optimizer, loss_of = adamw(config.learning_rate, config.weight_decay), adapted_loss(adaptation, precision)
    mesh = choose_mesh(config.mesh, config.examples_at_once)
    frozen = mesh.place_parameters(frozen)

    def step_of(frozen: Params) -> StepFn:
        return partial(train_step, loss_of(frozen), optimizer, micro_batch=config.micro_batch, mesh=mesh)

    updates = make_frozen_updates(step_of, frozen, mesh)
    evaluation = make_frozen_evaluation(adapted_loss(adaptation, "fp32"), frozen, mesh)
    rate = optax.constant_schedule(config.learning_rate)
    return Training(updates, evaluation, rate, None, precision, mesh), optimizer
