"""The library's own updates as a training under measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from newllm_jax.training.memory import planned_bytes
from newllm_jax.training.mesh import ONE_DEVICE, DeviceMesh
from newllm_jax.training.split import Data
from newllm_jax.training.step import Totals, TrainState, UpdateFn


class JaxTraining:
    """A compiled `updates` of the library, with its state, on batches in a given order.

    Attributes:
      order: `[updates, batch]`, the examples of each update.
    """

    def __init__(
        self,
        updates: UpdateFn,
        state: TrainState,
        data: Data,
        order: np.ndarray,
        seed: int = 0,
        mesh: DeviceMesh = ONE_DEVICE,
    ) -> None:
        self.updates: Any = updates
        self.state, self.data, self.order = state, mesh.place(jax.tree.map(jnp.asarray, data)), mesh.place(order)
        self.totals, self.key, self.done = Totals.zero(), jax.random.key(seed), 0
        self.planned_bytes = 0

    def prepare(self) -> int:
        """Compiles; makes no update."""
        self.updates = self.updates.compile(*self._arguments(1))
        self.planned_bytes = planned_bytes(self.updates.function)
        return 0

    def run(self, updates: int) -> None:
        """One call of the library's compiled loop."""
        assert self.done + updates <= len(self.order)  # the library would read the last batch again
        self.state, self.totals = self.updates(*self._arguments(updates))
        self.done += updates
        jax.block_until_ready((self.state, self.totals))

    def loss(self) -> float:
        """The mean loss per target since the last call."""
        return self.sums()[0]

    def sums(self) -> tuple[float, int]:
        """The mean loss since the last call, and the number of targets it is of."""
        sums = jax.device_get(self.totals.sums)
        self.totals = Totals.zero()
        return float(sums.loss) / int(sums.count), int(sums.count)

    def _arguments(self, updates: int) -> tuple[Any, ...]:
        return self.state, self.totals, self.data, self.order, self.done, self.done + updates, self.key


def write_weights(path: Path, params: Any) -> int:
    """Writes parameters under their names (`cell/gates_kernel`) for the peers to begin with; returns their number."""
    flat: dict[str, Any] = flatten_dict(jax.device_get(params), sep="/")
    np.savez(path, **{name: np.asarray(value) for name, value in flat.items()})  # type: ignore[arg-type]
    return sum(value.size for value in flat.values())
