"""Optax chains: Adam behind a global-norm clip whose bound, like the learning rate, follows a schedule; AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import optax

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam and AdamW


def clipping_schedule(norms: Sequence[float], epochs: Sequence[int], steps_per_epoch: int) -> optax.Schedule:
    """The bound of the gradients' global norm by update: `norms[0]` below `epochs[0]` (from 0), and so on.

    This is what the New-LLM report calls adaptive clipping; `optax.adaptive_grad_clip` is another method.
    """
    borders = [epoch * steps_per_epoch for epoch in epochs]
    return optax.join_schedules([optax.constant_schedule(norm) for norm in norms], borders)


def learning_rate_schedule(name: str, peak: Any, warmup_steps: int, decay_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then `constant`, or `cosine` down to 0 at `decay_steps` (warm-up counted in)."""
    if name == "cosine":
        main = optax.cosine_decay_schedule(peak, max(decay_steps - warmup_steps, 1))
    else:
        main = optax.constant_schedule(peak)
    if warmup_steps == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), main], [warmup_steps])


def clipped_adam(
    learning_rate: optax.Schedule, clip_norm: optax.Schedule, weight_decay: Any = None
) -> optax.GradientTransformation:
    """Adam (0.9, 0.999, 1e-8; Kingma & Ba 2015) on gradients clipped to a scheduled global norm.

    Args:
      weight_decay: of AdamW (Loshchilov & Hutter 2019), for kernels and embeddings; biases and norms are not decayed.
        None: Adam.
    """
    clip = optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=clip_norm)
    if weight_decay is None:
        return optax.chain(clip, optax.adam(learning_rate, *BETAS, EPSILON))
    decayed = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(clip, optax.adamw(learning_rate, *BETAS, EPSILON, weight_decay=weight_decay, mask=decayed))


def adamw(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, 1e-8; Loshchilov & Hutter 2019) whose decay is for all parameters, norms included."""
    return optax.adamw(learning_rate, *BETAS, EPSILON, weight_decay=weight_decay)
