"""When a run stops before its end: asked to, or because its time limit leaves too little for what comes next."""

from __future__ import annotations

from pathlib import Path

import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import Stopped
from newllm_jax.training import stopping as module
from newllm_jax.training.clock import Clock
from newllm_jax.training.stopping import Stopping

pytestmark = pytest.mark.quick


class Hands(Clock):
    """A clock that a test sets."""

    now = 0.0

    def since_start(self):
        return self.now


def limited(limit: str | None = "100s", **options) -> Stopping:
    return Stopping(Hands(), Path("runs/some"), NewLLMConfig(time_limit=limit), **options)


def latest(stopping: Stopping, *parts: str) -> float:
    """The last second at which these parts are begun."""
    for second in range(101):
        stopping.clock.now = second
        if stopping.reason(*parts):
            return second - 1
    return 100


def test_what_comes_next_must_fit_before_the_limit(monkeypatch):
    monkeypatch.setattr(module, "MARGIN", 1.0)
    monkeypatch.setattr(module, "RESERVE", (1.0, 0.01))
    stopping = limited()
    assert latest(stopping, "epoch", "checkpoint") == 98  # nothing is known of them
    stopping.took("epoch", 20.0)
    stopping.took("epoch", 30.0)
    stopping.took("epoch", 25.0)
    assert latest(stopping, "epoch", "checkpoint") == 68
    stopping.took("checkpoint", 7.0)
    assert latest(stopping, "epoch", "checkpoint") == 61
    assert latest(stopping, "checkpoint") == 91
    for _ in range(module.REMEMBERED):
        stopping.took("epoch", 10.0)
    assert latest(stopping, "epoch") == 88  # what took longer is long ago


def test_next_time_may_take_longer_and_the_process_has_an_end():
    stopping = limited()
    stopping.took("epoch", 50.0)
    assert latest(stopping, "epoch") < 100 - 50 * 1.1 - 1


def test_the_reason_tells_how_to_go_on():
    stopping = limited("2m")
    stopping.clock.now = 1000.0
    with pytest.raises(Stopped, match="^before the time limit of 2m; --resume runs/some continues$"):
        stopping.check()
    with pytest.raises(Stopped, match="^--resume runs/some continues$"):
        limited(None, asked=lambda: True).check()


def test_no_limit_never_stops():
    stopping = limited(None)
    stopping.took("epoch", 1e9)
    stopping.clock.now = 1e9
    assert not stopping.reason("epoch")
    stopping.check("epoch")


def test_between_like_parts_their_time_is_measured(monkeypatch):
    seconds = iter([0.0, 10.0, 50.0, 60.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    stopping, done = limited(), []
    advance = stopping.between("base", done.append)
    stopping.clock.now = 10.0
    advance(3)
    stopping.clock.now = 50.0
    with pytest.raises(Stopped):  # the last one took 40 s, and 50 are left
        advance(4)
    assert done == [3, 4]
