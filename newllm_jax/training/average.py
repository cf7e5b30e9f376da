"""A moving average of the parameters over the updates, which generalises better than the last ones.

After update n, with the average p and the parameters q:

    p <- d p + (1 - d) q,    d = min(decay, (n - 1) / (n + 9))

The second bound forgets the first parameters while the updates are few: it averages over about the last tenth of them.
"""

from __future__ import annotations

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Average:
    """A moving average of parameters.

    Attributes:
      params: the average.
      updates: how many there were, int32.
    """

    params: Any
    updates: Any

    @classmethod
    def start(cls, params: Any) -> Self:
        """Of the parameters before the first update, which the first one replaces."""
        return cls(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(self, params: Any, decay: float | jax.Array) -> Self:
        """After one more update, which gave these parameters."""
        past = self.updates.astype(jnp.float32)
        kept = jnp.minimum(decay, past / (past + 10))
        average = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, self.params, params)
        return type(self)(average, self.updates + 1)
