"""A trace of a few updates, as JAX's profiler writes it: for TensorBoard's profile plug-in, or for Perfetto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from newllm_jax.processes import is_first

UPDATES = 3  # in a trace, at most: more of them say the same, and a trace grows by thousands of events with each


class Profile:
    """Traces one call of a training's compiled updates: the second one, for the first also compiles.

    Attributes:
      folder: of the trace.
      updates: how many updates it has; 0 until there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.updates, self._calls = folder, 0, 0

    @property
    def is_next(self) -> bool:
        """Whether the next call is the one to be traced."""
        return self._calls == 1

    @contextmanager
    def call(self, updates: int) -> Iterator[None]:
        """Around every call, which makes so many updates and is over when the context ends."""
        is_traced, self._calls = self.is_next, self._calls + 1
        if not (is_traced and is_first()):
            yield
            return
        with jax.profiler.trace(str(self.folder)):
            yield
        self.updates = updates
