"""The device memory that a compiled program needs, by XLA's own plan."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from newllm_jax.training.split import Data
from newllm_jax.training.step import Totals, TrainState, UpdateFn


def planned_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, results and what lies between, in bytes; 0 where the back end does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    buffers = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return buffers + memory.temp_size_in_bytes


def update_bytes(updates: UpdateFn, state: TrainState, data: Data, steps: int, batch_size: int) -> int:
    """What the updates of an epoch need, data included; nothing but shapes is read.

    Args:
      state, data: shapes will do.
    """
    order: Any = jax.ShapeDtypeStruct((steps, batch_size), jnp.int32)
    totals, key = jax.eval_shape(Totals.zero), jax.eval_shape(lambda: jax.random.key(0))
    lowered = cast(jax.stages.Wrapped, updates).lower(state, totals, data, order, 0, 1, key)
    return planned_bytes(lowered.compile())
