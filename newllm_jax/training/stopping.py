"""When a run ends before its last epoch: it is asked to, or its time limit is too close for what comes next."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

from newllm_jax.config import RunConfig, check
from newllm_jax.errors import Stopped
from newllm_jax.processes import first_reason
from newllm_jax.training.clock import Clock

Asked: TypeAlias = Callable[[], bool]  # whether the run should stop; called after each second or so of work

REMEMBERED = 5  # durations of each part: what is compiled the first time is soon forgotten
MARGIN = 1.2  # how much longer the next one may take
RESERVE = 3.0, 0.01  # seconds and a share of the limit, for the start and the end of the process


def never() -> bool:
    """Nobody asks a run to stop."""
    return False


class Stopping:
    """Looks between the parts of a run (an update or some, a validation, a checkpoint) whether it should stop there.

    Attributes:
      clock: of the run.
      run: its directory.
    """

    def __init__(self, clock: Clock, run: Path, config: RunConfig, asked: Asked = never) -> None:
        check("stop", asked, "a function without arguments", callable(asked))
        self.clock: Clock = clock
        self.run: Path = run
        self._config, self._asked = config, asked
        self._taken: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def reason(self, *parts: str) -> str:
        """Why the run should stop here; "" where it should not. Several processes have one reason together.

        Args:
          parts: what comes next. Each may take as long as the longest of the last ones did; what never was takes none.
        """
        return first_reason(self._own_reason(parts))

    def _own_reason(self, parts: Sequence[str]) -> str:
        """The reason of this process alone."""
        if self._asked():
            return f"--resume {self.run} continues"
        needed = sum(max(self._taken[part], default=0.0) for part in parts)
        seconds, share = RESERVE
        if self.clock.since_start() + MARGIN * needed + seconds > (1 - share) * self._config.limit_seconds:
            return f"before the time limit of {self._config.time_limit}; --resume {self.run} continues"
        return ""

    def check(self, *parts: str) -> None:
        """Raises Stopped where there is a reason to stop before these parts."""
        if reason := self.reason(*parts):
            raise Stopped(reason)

    def took(self, part: str, seconds: float) -> None:
        """Remembers how long a part took."""
        self._taken[part].append(seconds)

    def timer(self, part: str) -> Callable[[float], None]:
        """`took` of a part."""
        return partial(self.took, part)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Remembers how long a part takes."""
        started = time.monotonic()
        yield
        self.took(part, time.monotonic() - started)

    def between(self, part: str, advance: Callable[[int], None]) -> Callable[[int], None]:
        """`advance`, called after each of several like parts, that also looks whether to stop there."""
        last = time.monotonic()

        def look(done: int) -> None:
            nonlocal last
            advance(done)
            last, before = time.monotonic(), last
            self.took(part, last - before)
            self.check(part)

        return look
