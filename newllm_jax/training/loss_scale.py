"""Dynamic loss scaling (Micikevicius et al. 2018): gradients too small for half precision are kept from vanishing.

The loss is multiplied by the scale before its gradient is taken, and the gradient divided by it after. A scale that is
too large makes gradients overflow: that update is skipped and the scale halved; it grows again while all goes well.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

INITIAL = 2.0**15
LARGEST = 2.0**24
SMALLEST = 1.0  # overflow at this scale is no matter of the scale
GROWTH_INTERVAL = 2000  # updates


@flax.struct.dataclass
class LossScale:
    """The scale and what it depends on: a part of the train state.

    Attributes:
      value: the scale (float32), a power of two, so that scaling loses no bit.
      good: applied updates since the scale last changed.
      skipped: skipped updates since the start of the training.
    """

    value: jax.Array
    good: jax.Array
    skipped: jax.Array


def initial_loss_scale(precision: str) -> LossScale | None:
    """That of the first update; None where the exponents of the precision reach as far as those of float32."""
    if precision != "fp16":
        return None
    return LossScale(jnp.float32(INITIAL), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def unscale(gradients: Any, scale: LossScale) -> Any:
    """The gradients of the loss itself."""
    return jax.tree.map(lambda gradient: gradient / scale.value, gradients)


def next_loss_scale(scale: LossScale, finite: jax.Array) -> tuple[LossScale, jax.Array]:
    """The scale after an update whose numbers are `finite` or not, and whether that update is to be skipped.

    An update that is not finite at the smallest scale is not skipped: it is for the guard of the loop to find.
    """
    skip = ~finite & (scale.value > SMALLEST)
    good = jnp.where(finite, scale.good + 1, 0)
    grown = good >= GROWTH_INTERVAL
    larger = jnp.where(grown, jnp.minimum(scale.value * 2, LARGEST), scale.value)
    return LossScale(
        value=jnp.where(finite, larger, scale.value / 2),
        good=jnp.where(grown, 0, good),
        skipped=scale.skipped + skip,
    ), skip
