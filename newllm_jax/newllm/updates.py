"""The compiled updates and evaluation of New-LLM, its optimiser and schedules, from the settings."""

from __future__ import annotations

from functools import partial

import optax

from newllm_jax.config import NewLLMConfig, Precision
from newllm_jax.newllm.loss import initial_carry, next_word_loss
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.recurrence import gpu
from newllm_jax.newllm.recurrence.scan import form_for
from newllm_jax.newllm.run import init_params
from newllm_jax.training.loop import Training
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.optimizer import clipped_adam, clipping_schedule, learning_rate_schedule
from newllm_jax.training.precision import resolve_precision, supported_precisions
from newllm_jax.training.step import TrainState, init_state, make_evaluation, make_updates, train_step


def training_precision(config: NewLLMConfig) -> Precision:
    """The precision that a configuration is trained in: `auto` selects bf16 where the time loop is a GPU kernel.

    There it is the fastest, and training ends no worse than in tf32 (docs/results); in the plain time loop it gains
    nothing.

    Raises:
      InputError: a precision that the default device does not have.
    """
    obstacle = kernel_obstacle(config, "bf16", config.batch_size)  # so that no `micro_batch` changes the precision
    if config.precision == "auto" and "bf16" in supported_precisions() and not obstacle:
        return "bf16"
    return resolve_precision(config.precision)


def training_model(config: NewLLMConfig, vocabulary_size: int, precision: Precision) -> ContextVectorLM:
    """The model of a configuration as it is trained, with the fastest form of the time loop."""
    model = ContextVectorLM.from_config(config, vocabulary_size, precision)
    return model.clone(form=form_for(model.spec, config.examples_at_once, config.sequence_length - 1))


def slow_loop_warning(config: NewLLMConfig) -> str:
    """Why a GPU that could run the time loop as kernels will not; "" where it will, or is none of those."""
    if "bf16" not in supported_precisions() or config.precision in ("fp32", "fp16"):
        return ""  # another device, or a precision whose products the kernels do not have and the user asked for
    precision = "bf16" if config.precision == "auto" else config.precision
    reason = kernel_obstacle(config, precision, config.examples_at_once)
    return reason and f"The time loop runs step by step, slower than as one GPU kernel: {reason}."


def kernel_obstacle(config: NewLLMConfig, precision: Precision, batch: int) -> str:
    """`gpu.obstacle` of a configuration, for `batch` texts at a time."""
    spec = ContextVectorLM.from_config(config, 1, precision).spec
    return gpu.obstacle(spec, batch, config.sequence_length - 1)


def initial_state(
    config: NewLLMConfig, model: ContextVectorLM, optimizer: optax.GradientTransformation
) -> TrainState:  # fmt: skip
    """The state before the first update."""
    params, scale = init_params(model, config.seed), initial_loss_scale(model.precision)
    return init_state(params, optimizer, scale, config.ema_decay > 0, initial_carry(config, config.batch_size))


def build_training(
    config: NewLLMConfig, model: ContextVectorLM, steps_per_epoch: int
) -> tuple[Training, optax.GradientTransformation]:
    """The compiled functions of a run, and its optimiser. Evaluation is strict float32 whatever training is."""
    horizon = (config.decay_epochs or config.num_epochs) * steps_per_epoch
    rate = learning_rate_schedule(config.schedule, config.learning_rate, config.warmup_steps, horizon)
    clip = clipping_schedule(config.clip_norms, config.clip_epochs, steps_per_epoch)
    optimizer = clipped_adam(rate, clip, config.weight_decay)
    strict = training_model(config, model.vocabulary_size, "fp32")
    step = partial(
        train_step, next_word_loss(model), optimizer, micro_batch=config.micro_batch, ema_decay=config.ema_decay
    )  # fmt: skip
    return Training(make_updates(step), make_evaluation(next_word_loss(strict)), rate, clip, model.precision), optimizer
