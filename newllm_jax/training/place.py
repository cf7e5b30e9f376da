"""Where an epoch stands between two of its updates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from newllm_jax.training.step import Totals, TrainState


@dataclass(frozen=True)
class Place:
    """All that the rest of an epoch follows from.

    Attributes:
      epoch: its number, from 1.
      done: how many of its updates are done.
      state, totals: after these.
      skipped_before: how many updates the epochs before it skipped (fp16).
      seconds: that it took so far.
    """

    epoch: int
    done: int
    state: TrainState
    totals: Totals
    skipped_before: int
    seconds: float

    @classmethod
    def start(cls, epoch: int, state: TrainState) -> Place:
        """Before the first update, whose carry is all zeros."""
        skipped = 0 if state.loss_scale is None else int(state.loss_scale.skipped)
        state = dataclasses.replace(state, carry=jax.tree.map(jnp.zeros_like, state.carry))
        return cls(epoch, 0, state, Totals.zero(), skipped, 0.0)

    @property
    def skipped(self) -> int:
        """How many of its updates were skipped; 0 without a loss scale."""
        return 0 if self.state.loss_scale is None else int(self.state.loss_scale.skipped) - self.skipped_before
