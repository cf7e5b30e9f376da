"""How long a run took."""

from __future__ import annotations

import time


class Clock:
    """The seconds of a run, those before a resumption included."""

    def __init__(self) -> None:
        self._started, self._before = time.monotonic(), 0.0

    def resume(self, seconds: float) -> None:
        """Counts the seconds that a checkpoint recorded; of several, the most."""
        self._before = max(self._before, seconds)

    def since_start(self) -> float:
        """The seconds since the run was started or resumed."""
        return time.monotonic() - self._started

    def seconds(self) -> float:
        """By now."""
        return self._before + self.since_start()
