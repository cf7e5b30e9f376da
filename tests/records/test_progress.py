"""The epochs of a run: lines where there is no terminal, a live table of the last ones where there is."""

import io
import json
import re
import sys

import pytest
from rich.console import Console

from newllm_jax.records import progress
from newllm_jax.records.directory import RunDir
from newllm_jax.records.epoch_table import EpochLine, epoch_table
from newllm_jax.records.narration import JsonLines
from newllm_jax.records.progress import SHOWN, TrainingProgress
from newllm_jax.records.trackers import NoTracker


def entry(epoch: int) -> dict:
    """An epoch of a run whose loss falls up to the fifth."""
    loss = 4.0 + abs(epoch - 5) / 10
    return {
        "epoch": epoch, "train_loss": 5.0, "val_loss": loss, "val_ppl": 60.0 + epoch, "val_accuracy": 0.25,
        "tokens_per_second": 1234.5, "seconds": 2.0,
    }  # fmt: skip


class Terminal(io.StringIO):
    """What says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


def told(tmp_path, epochs: int, **options) -> None:
    """A run tells some epochs."""
    with RunDir.create(tmp_path, "run") as run:
        run.begin({})
        with TrainingProgress(run, NoTracker(), 12, **options) as shown:
            for epoch in range(1, epochs + 1):
                shown.progress(epoch, 1, 2, 4.0, 1000.0)
                shown.epoch(entry(epoch))
            if shown._live:
                shown._live.refresh()
                assert [line.entry["epoch"] for line in shown._lines] == [*range(epochs - SHOWN + 1, epochs + 1)]


LINE = (
    "epoch   1/12  train loss 5.0000  val loss 4.4000  val PPL 61.00  accuracy 25.0%  1,234 tokens/s  2.0 s  "
    "left 0:00:22 *\n"
)


def test_without_a_terminal_there_is_a_line_an_epoch_and_nothing_else(tmp_path, capsys):
    told(tmp_path, 6)
    out, err = capsys.readouterr()
    assert out.startswith(LINE) and out.count("\n") == 6 and err == ""
    assert [line.endswith("*") for line in out.splitlines()] == [True] * 5 + [False]


def test_events_have_the_metrics(tmp_path):
    written = []
    told(tmp_path, 1, narrate=JsonLines(written.append), stage=2)
    assert json.loads(written[0]) == {"event": "epoch", "stage": 2, **entry(1), "epochs": 12, "is_best": True}


def test_on_a_terminal_every_line_comes_in_order_when_it_leaves_the_table(tmp_path, monkeypatch):
    stdout, stderr = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "terminal", lambda: Console(file=stderr, width=120, force_terminal=True))
    told(tmp_path, 11)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stderr.getvalue() + stdout.getvalue())  # without colours
    lines = [shown.index(f"epoch {epoch:>3}/12  train loss") for epoch in range(1, 12)]
    assert lines == sorted(lines)
    assert "tokens/s  seconds" in shown  # the head of the table
    assert shown.count("epoch   9/12  train loss") == 1


def test_a_function_of_the_callers_own_gets_each_line_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    lines = []
    with RunDir.create(tmp_path, "run") as run:
        run.begin({})
        with TrainingProgress(run, NoTracker(), 12, narrate=lines.append) as shown:
            shown.epoch(entry(1))
            assert lines == [LINE.rstrip("\n")]


@pytest.mark.parametrize("width, columns", [(20, 2), (40, 3), (80, 7), (200, 7)])
def test_the_table_has_the_columns_that_there_is_room_for(width, columns):
    table = epoch_table([EpochLine(entry(5), "", True), EpochLine(entry(6), "", False)], width)
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    head, best, last = console.file.getvalue().rstrip("\n").splitlines()
    assert len(table.columns) == columns + 1
    assert head.split()[0] == "epoch" and "…" not in head + best
    assert best.rstrip().endswith("*") and not last.rstrip().endswith("*")
