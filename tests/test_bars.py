"""Progress bars: nothing without a terminal; one display on a terminal, with bars in bars."""

import io
import sys

import pytest
from rich.console import Console

from newllm_jax import bars
from newllm_jax.bars import Counted, no_bar, progress_bar


class Terminal(io.StringIO):
    """What says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_a_terminal(monkeypatch):
    """From its call on stderr is a terminal; between the fixtures and the test pytest puts its own there."""

    def begin() -> Terminal:
        stderr = Terminal()
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(bars, "terminal", lambda: Console(file=stderr, width=80, force_terminal=True))
        return stderr

    return begin


def test_without_a_terminal_nothing_is_shown(capsys):
    with progress_bar("work", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_a_bar_within_a_bar_shares_its_display_and_leaves_with_its_work(on_a_terminal):
    terminal = on_a_terminal()
    with progress_bar("outer", 0):
        display = bars._shown
        with progress_bar("inner", 4) as advance:
            advance(1)
            assert bars._shown is display
            assert [(task.description, task.completed, task.total) for task in display.tasks] == [
                ("outer", 0, None), ("inner", 1, 4),
            ]  # fmt: skip
        assert [task.description for task in display.tasks] == ["outer"]
        with no_bar():
            assert not display.live.is_started
        assert display.live.is_started
    assert bars._shown is None
    assert "so far" in terminal.getvalue()


def test_work_that_fails_takes_its_bar_along(on_a_terminal):
    on_a_terminal()
    with pytest.raises(ZeroDivisionError), progress_bar("work", 1):
        assert bars._shown is not None
        1 / 0  # noqa: B018
    assert bars._shown is None


def test_counted_items_move_a_bar_each_time_that_they_are_iterated():
    moved = []
    items = Counted(range(bars.EVERY + 5), moved.append)
    assert list(items) == list(items) == [*range(bars.EVERY + 5)]
    assert moved == [bars.EVERY, 5] * 2
