"""The compiled updates and evaluation of New-LLM, its optimiser and schedules, from the settings."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Self

import jax
import optax

from newllm_jax.config import NewLLMConfig, Precision, check
from newllm_jax.newllm.dropout import Rate
from newllm_jax.newllm.loss import initial_carry, next_word_loss
from newllm_jax.newllm.model import DROPOUTS, ContextVectorLM, dropout_rates
from newllm_jax.newllm.recurrence import scan
from newllm_jax.newllm.recurrence.cell import Form
from newllm_jax.newllm.run import init_params
from newllm_jax.training.gradient import LossFn
from newllm_jax.training.loop import Training
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.members import Program, make_program
from newllm_jax.training.mesh import ONE_DEVICE, DeviceMesh, choose_mesh
from newllm_jax.training.optimizer import clipped_adam, clipping_schedule, learning_rate_schedule
from newllm_jax.training.precision import resolve_precision, supported_precisions
from newllm_jax.training.split import Data
from newllm_jax.training.step import StepFn, Totals, TrainState, init_state, make_evaluation, make_updates, train_step

NUMBERS = ("learning_rate", "weight_decay", "ema_decay", *DROPOUTS)
# What else may differ among trainings of one compiled program: it is read before the first update, or on the host.
OUTSIDE = ("seed", "initialization", "forget_bias", "patience", "minimum_gain", "checkpoint_every")


class Numbers(NamedTuple):
    """The settings that a compiled training can take as arrays, each of one training or of several (`[M]`).

    Attributes:
      learning_rate: the peak.
      weight_decay, ema_decay: of AdamW, and of the moving average.
      rates: of the kinds of dropout that are on, by setting.
    """

    learning_rate: Any
    weight_decay: Any
    ema_decay: Any
    rates: dict[str, Rate]

    @classmethod
    def from_config(cls, config: NewLLMConfig) -> Self:
        """Those of one training."""
        return cls(config.learning_rate, config.weight_decay, config.ema_decay, dropout_rates(config))


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


def training_model(
    config: NewLLMConfig, vocabulary_size: int, precision: Precision, members: int = 1
) -> ContextVectorLM:  # fmt: skip
    """The model of a configuration as it is trained, with the fastest form of the time loop.

    Args:
      members: trainings that a device computes side by side.
    """
    model = ContextVectorLM.from_config(config, vocabulary_size, precision)
    return model.clone(form=time_loop_forms(config, model, members)[0])


def time_loop_forms(config: NewLLMConfig, model: ContextVectorLM, members: int = 1) -> list[Form]:
    """The forms of the time loop that can train a model, the fastest first; `members` as in `training_model`."""
    batch = config.examples_at_once // training_mesh(config).size
    return scan.forms_for(model.spec, batch, config.sequence_length - 1, members)


def training_mesh(config: NewLLMConfig) -> DeviceMesh:
    """The devices that share out the texts of an update, each of which has all parameters, for they are few.

    Raises:
      InputError: as `choose_mesh` does, and for `fsdp`.
    """
    mesh = choose_mesh(config.mesh, config.examples_at_once)
    check("mesh", config.mesh, "auto or data=N: the parameters of New-LLM are too few to be divided", mesh.fsdp == 1)
    return mesh


def slow_loop_warning(config: NewLLMConfig) -> str:
    """Why a GPU that could run the time loop as kernels will not; "" where it will, or is none of those."""
    if "bf16" not in supported_precisions() or config.precision in ("fp32", "fp16"):
        return ""  # another device, or a precision whose products the kernels do not have and the user asked for
    precision = "bf16" if config.precision == "auto" else config.precision
    reason = kernel_obstacle(config, precision, config.examples_at_once)
    return reason and f"The time loop runs step by step, slower than as one GPU kernel: {reason}."


def kernel_obstacle(config: NewLLMConfig, precision: Precision, batch: int) -> str:
    """`scan.kernel_obstacle` of a configuration, for `batch` texts at a time."""
    spec = ContextVectorLM.from_config(config, 1, precision).spec
    return scan.kernel_obstacle(spec, batch, config.sequence_length - 1)


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
    numbers, mesh = Numbers.from_config(config), training_mesh(config)
    rate, clip = _schedules(config, steps_per_epoch, numbers)
    updates = make_updates(_step(config, model, steps_per_epoch, numbers, mesh), mesh)
    evaluation = make_evaluation(_strict_loss(config, model), mesh)
    optimizer = _optimizer(config, steps_per_epoch, numbers)
    return Training(updates, evaluation, rate, clip, model.precision, mesh), optimizer


def build_members(
    config: NewLLMConfig, model: ContextVectorLM, steps_per_epoch: int, members: int, mesh: DeviceMesh = ONE_DEVICE
) -> Program:  # fmt: skip
    """The compiled functions of trainings that differ from a configuration in `NUMBERS` and `OUTSIDE` only.

    Args:
      members: how many trainings there are.
      mesh: the devices that share out the members.
    """
    config = config.override({"mesh": str(ONE_DEVICE)})  # of each of them
    model = training_model(config, model.vocabulary_size, model.precision, -(-members // mesh.size))

    def step(
        numbers: Numbers, state: TrainState, batch: Data, present: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Totals]:
        return _step(config, model, steps_per_epoch, numbers)(state, batch, present, key)

    return make_program(step, _strict_loss(config, model), mesh)


def program_of(config: NewLLMConfig) -> dict[str, Any]:
    """What compiled programs depend on: trainings for which it is equal can share one.

    Of numbers only whether they are 0, which leaves something out of the program.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in OUTSIDE}
    return {name: value > 0 if name in NUMBERS else value for name, value in settings.items()}


def _step(
    config: NewLLMConfig,
    model: ContextVectorLM,
    steps_per_epoch: int,
    numbers: Numbers,
    mesh: DeviceMesh = ONE_DEVICE,
) -> StepFn:
    """One update."""
    optimizer = _optimizer(config, steps_per_epoch, numbers)
    loss = next_word_loss(model, numbers.rates)
    return partial(train_step, loss, optimizer, micro_batch=config.micro_batch, ema_decay=numbers.ema_decay, mesh=mesh)


def _strict_loss(config: NewLLMConfig, model: ContextVectorLM) -> LossFn:
    return next_word_loss(training_model(config, model.vocabulary_size, "fp32"))


def _optimizer(config: NewLLMConfig, steps_per_epoch: int, numbers: Numbers) -> optax.GradientTransformation:
    decay = numbers.weight_decay if config.weight_decay else None
    return clipped_adam(*_schedules(config, steps_per_epoch, numbers), decay)


def _schedules(
    config: NewLLMConfig, steps_per_epoch: int, numbers: Numbers
) -> tuple[optax.Schedule, optax.Schedule]:  # fmt: skip
    """The learning rate, and the bound of the gradient's norm, by update."""
    horizon = (config.decay_epochs or config.num_epochs) * steps_per_epoch
    rate = learning_rate_schedule(config.schedule, numbers.learning_rate, config.warmup_steps, horizon)
    return rate, clipping_schedule(config.clip_norms, config.clip_epochs, steps_per_epoch)
