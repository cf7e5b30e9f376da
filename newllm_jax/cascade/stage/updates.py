"""The compiled updates of a stage, its evaluation and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import optax

from newllm_jax.cascade.stage.model import Stage, stage_config
from newllm_jax.config import CascadeConfig
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.training.back_end import triton_obstacle
from newllm_jax.training.loop import Training
from newllm_jax.training.losses import Sums, summed_losses
from newllm_jax.training.optimizer import adamw
from newllm_jax.training.precision import supported_precisions
from newllm_jax.training.step import LossFn, Params, Part, UpdateFn, make_evaluation, make_updates, train_step

WIDTH_MULTIPLE, KERNEL_BATCHES = 64, (16, 32, 64)


@dataclass(frozen=True)
class StageTraining:
    """What all stages of a run share.

    Attributes:
      stage: the architecture, in the precision of training.
      strict: the same in strict float32, for everything that is reported.
      config: of the run.
      optimizer: AdamW of the configuration.
      training: the compiled functions.
    """

    stage: Stage
    strict: Stage
    config: CascadeConfig
    optimizer: optax.GradientTransformation
    training: Training


def build_stage_training(stage: Stage, config: CascadeConfig) -> StageTraining:
    """The compiled functions and the optimiser of a stage, whose precision is that of training."""
    strict, optimizer = stage.clone(precision="fp32"), adamw(config.learning_rate, config.weight_decay)
    training = Training(
        stage_updates(stage, config, optimizer),
        make_evaluation(next_token_loss(strict)),
        optax.constant_schedule(config.learning_rate),
        None,
        stage.precision,
    )
    return StageTraining(stage, strict, config, optimizer, training)


def next_token_loss(stage: Stage) -> LossFn:
    """The loss of a stage as the update loop needs it; its batch is `(hidden [B, H], targets [B])`."""

    def loss(
        params: Params, batch: Any, present: jax.Array, key: jax.Array | None, carry: None, part: Part | None = None
    ) -> tuple[Sums, None]:  # fmt: skip
        hidden, targets = batch
        _, logits = cast(tuple[jax.Array, jax.Array], stage.apply({"params": params}, hidden))
        return summed_losses(logits, targets, present), carry

    return loss


def stage_updates(stage: Stage, config: CascadeConfig, optimizer: optax.GradientTransformation) -> UpdateFn:
    """The compiled updates of a stage: through GPU kernels of their own where those can compute them."""
    if kernel_obstacle(stage, config.batch_size, config.micro_batch):
        plain = partial(train_step, next_token_loss(stage), optimizer, micro_batch=config.micro_batch)
        return make_updates(plain)
    from newllm_jax.cascade.stage.fused_step import stage_step  # Pallas takes time to import, and may be absent

    return make_updates(partial(stage_step, stage, config, optimizer))


def kernel_obstacle(stage: Stage, batch_size: int, micro_batch: int | None = None) -> str:
    """Why the kernels of `fused_step.py` cannot compute a stage's updates; "" where they can.

    It says nothing of the device: only GPUs that can run the kernels have the precision tf32.
    """
    config = stage.config
    heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widths = config.vocab_size, config.hidden_size, config.intermediate_size, *heads
    if stage.precision != "tf32":
        return f"their products are in tf32, not in {stage.precision}"
    if any(width % WIDTH_MULTIPLE for width in widths):
        return f"the widths of the base are no multiples of {WIDTH_MULTIPLE}"
    if batch_size not in KERNEL_BATCHES:
        return f"batch_size must be one of {', '.join(map(str, KERNEL_BATCHES))}"
    if micro_batch is not None and micro_batch < batch_size:
        return "micro_batch adds up gradients, which those kernels never write to memory"
    return triton_obstacle()


def slow_update_warning(config: CascadeConfig, base: LlamaConfig = LlamaConfig()) -> str:  # noqa: B008 (frozen)
    """Why a GPU that could run the updates through kernels will not; "" where it will, or is none of those.

    Args:
      base: the architecture of the base; by default SmolLM2-135M's.
    """
    if "tf32" not in supported_precisions() or config.precision not in ("auto", "tf32"):
        return ""  # another device, or a precision whose products the kernels do not have and the user asked for
    stage = Stage(stage_config(base, config.stage_layers), "tf32")
    reason = kernel_obstacle(stage, config.batch_size, config.micro_batch)
    return reason and f"A stage's updates do without GPU kernels of their own, and are slower: {reason}."
