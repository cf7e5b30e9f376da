"""The loss of fine-tuning: the next token at every position of a chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from newllm_jax.config import Precision
from newllm_jax.finetuning.adaptation import Adaptation
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.gradient import LossFn, Part
from newllm_jax.training.losses import Sums, summed_losses
from newllm_jax.training.step import Params


def sequence_loss(model: SmolLM2) -> LossFn:
    """The loss over whole chunks; its batch is `ids [B, 129]`, the targets all but the first of each."""
    return _loss(lambda params, ids: cast(tuple[jax.Array, Any], model.apply({"params": params}, ids))[0])


def adapted_loss(adaptation: Adaptation, precision: Precision) -> Callable[[Params], LossFn]:
    """`sequence_loss` by the trained parameters, from the frozen ones."""
    return lambda frozen: _loss(partial(adaptation.logits, precision, frozen))


def _loss(logits_of: Callable[[Params, jax.Array], jax.Array]) -> LossFn:
    def loss(
        params: Params, ids: jax.Array, present: jax.Array, key: jax.Array | None, carry: None, part: Part | None = None
    ) -> tuple[Sums, None]:  # fmt: skip
        logits, targets = logits_of(params, ids[:, :-1]), ids[:, 1:]
        return summed_losses(logits, targets, jnp.broadcast_to(present[:, None], targets.shape)), carry

    return loss
