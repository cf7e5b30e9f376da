"""The loss of fine-tuning: the next token at every position of a chunk."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.losses import Sums, summed_losses
from newllm_jax.training.step import LossFn, Params, Part


def sequence_loss(model: SmolLM2) -> LossFn:
    """The loss over whole chunks; its batch is `ids [B, 129]`, the targets all but the first of each."""

    def loss(
        params: Params, ids: jax.Array, present: jax.Array, key: jax.Array | None, carry: None, part: Part | None = None
    ) -> tuple[Sums, None]:  # fmt: skip
        logits, _ = cast(tuple[jax.Array, Any], model.apply({"params": params}, ids[:, :-1]))
        targets = ids[:, 1:]
        return summed_losses(logits, targets, jnp.broadcast_to(present[:, None], targets.shape)), carry

    return loss
