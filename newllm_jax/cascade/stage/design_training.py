"""The compiled updates and evaluation of a design, whose examples are chunks.

A batch is `(ids [B, 129], ranks [B, 128])`. A token's rank is the share of the training tokens that are harder than it
by the criterion, so it is hard where `rank <= hard_ratio`, and any other share of hard tokens is another bound.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from newllm_jax.cascade.stage.designs import AnyDesign, SkipDesign, StageDesign
from newllm_jax.config import CascadeConfig
from newllm_jax.training.gradient import LossFn, Part
from newllm_jax.training.loop import Training
from newllm_jax.training.losses import Sums, summed_losses
from newllm_jax.training.mesh import choose_mesh
from newllm_jax.training.optimizer import adamw
from newllm_jax.training.step import Params, make_frozen_evaluation, make_frozen_updates, train_step


def design_loss(design: AnyDesign, base: Params) -> LossFn:
    """The loss of a design as the update loop needs it.

    A stage is trained on hard tokens or, where `trained_on` is all, on all of them, each of which passes it. A design
    that skips layers is trained on all tokens, in each chunk with a share of hard ones that is drawn anew, from 0 to
    twice `hard_ratio`, so that it works with many thresholds; its validation has the share `hard_ratio`.
    """

    def loss(
        trained: Params, batch: Any, present: jax.Array, key: jax.Array | None, carry: None, part: Part | None = None
    ) -> tuple[Sums, None]:  # fmt: skip
        ids, ranks = batch
        inputs, targets = ids[:, :-1], ids[:, 1:]
        counted = jnp.broadcast_to(present[:, None], targets.shape)
        hard = ranks <= hard_bounds(design, key, len(ids), part)[:, None]
        decision = design.decide(base, trained, inputs)
        if isinstance(design, SkipDesign):
            logits = design.logits(base, trained, decision, hard)
        else:
            logits, counted = stage_predictions(design, base, trained, decision, hard, counted)
        return summed_losses(logits, targets, counted), carry

    return loss


def stage_predictions(
    design: StageDesign, base: Params, trained: Params, decision: Any, hard: jax.Array, counted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The predictions `[B, T, V]` that a stage is trained by, and the tokens `[B, T]` that it is trained on."""
    on_all = design.config.trained_on == "all"
    if design.config.prediction == "mixes":
        hard = jnp.ones_like(hard) if on_all else hard
        return design.logits(base, trained, decision, hard), counted & hard
    logits = design.stage_logits(base, trained, decision, None if on_all else hard)
    return logits, counted if on_all else counted & hard


def hard_bounds(design: AnyDesign, key: jax.Array | None, chunks: int, part: Part | None) -> jax.Array:
    """The rank at or below which the tokens of each chunk are hard, `[chunks]`."""
    if key is None or not isinstance(design, SkipDesign):
        return jnp.full((chunks,), design.config.hard_ratio)
    if part is None:
        return 2 * design.config.hard_ratio * jax.random.uniform(key, (chunks,))
    drawn = 2 * design.config.hard_ratio * jax.random.uniform(key, (part.whole,))  # by the place in the whole batch
    return jax.lax.dynamic_slice_in_dim(jnp.pad(drawn, (0, chunks)), part.first, chunks)


def build_design_training(
    design: AnyDesign, strict: AnyDesign, base: Params
) -> tuple[Training, optax.GradientTransformation]:
    """The compiled functions and the optimiser. `strict`: the design in strict float32, for evaluation."""
    config: CascadeConfig = design.config
    optimizer = adamw(config.learning_rate, config.weight_decay)
    mesh = choose_mesh(config.mesh, config.examples_at_once)
    base = mesh.place_parameters(base)

    def step_of(base: Params) -> Any:
        return partial(train_step, design_loss(design, base), optimizer, micro_batch=config.micro_batch, mesh=mesh)

    training = Training(
        make_frozen_updates(step_of, base, mesh),
        make_frozen_evaluation(lambda base: design_loss(strict, base), base, mesh),
        optax.constant_schedule(config.learning_rate),
        None,
        design.base.precision,
        mesh,
    )
    return training, optimizer
