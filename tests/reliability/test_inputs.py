"""The bad inputs that cost next to nothing, in this process; `python -m tests.reliability.inputs` tries all of them."""

from __future__ import annotations

import shutil

import pytest

from newllm_jax.cli import process as cli
from tests.reliability.bad_input import GROUPS, Case
from tests.reliability.inputs import Outcome, faults, listing, namespace, try_call
from tests.reliability.tiny import write_corpus, write_rows

COSTLY = (  # these read sources, or continue a run of the sources that `inputs.make_material` makes
    "memory: ", "lower ", "epochs of", "num_stages: ", "precision: ", "max_words: must be with", "prompt: ",
    "dataset: corpus.txt is not", "num_epochs: ... has",
)  # fmt: skip
COMMANDS = [
    case
    for group in ("settings", "commands", "runs")
    for case in GROUPS[group]
    if case.code and not case.call and not case.environment and case.run in ("", "train", "exported")
    and not case.says.startswith(COSTLY) and "--dataset=corpus.txt" not in case.typed
]  # fmt: skip


@pytest.fixture
def try_command(capsys, small_run, exported_run, tmp_path):
    """Tries a case in a folder of its own, and returns what is wrong with how it ended."""

    def attempt(case: Case, number: int) -> list[str]:
        folder = tmp_path / str(number)
        folder.mkdir()
        write_corpus(folder / "corpus.txt")
        if case.run:
            shutil.copytree({"train": small_run, "exported": exported_run}[case.run], folder / "run")
        case.prepare(folder)
        before = listing(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            code = cli.main(list(case.typed))
        left = tuple(sorted(listing(folder) - before))
        return faults(case, Outcome(code, capsys.readouterr().err, left))

    return attempt


def test_commands_with_bad_input_end_in_a_line(try_command):
    assert len(COMMANDS) > 300
    wrong = {case.name: found for number, case in enumerate(COMMANDS) if (found := try_command(case, number))}
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


def test_calls_with_wrong_types_are_named(small_run, tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus.txt")
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    names, calls = namespace(small_run), GROUPS["calls"]
    assert len(calls) > 100
    tried = {case.call: faults(case, try_call(case, names, tmp_path)) for case in calls if "(small, " not in case.call}
    assert not any(tried.values()), "\n".join(f"{call}: {found}" for call, found in tried.items() if found)


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        (Outcome(2, "error: seed: no\n"), []),
        (Outcome(2, "error: seat: no\n"), ["another message"]),
        (Outcome(None, "error: seed: no\n"), ["hang"]),
        (Outcome(0, "error: seed: no\n"), ["exit code 0"]),
        (Outcome(2, "error: seed: no\nmore\n"), ["not one line"]),
        (Outcome(2, "seed: no\n"), ["not one line"]),
        (Outcome(1, "Traceback ...\nseed\n"), ["exit code 1", "traceback", "not one line"]),
        (Outcome(2, "error: seed: no\n", ("runs",)), ["left behind: runs"]),
        (Outcome(2, "error: seed: no\n", peak=2**33), ["8.0 GiB"]),
        (Outcome(2, f"error: seed: {'x' * 20_000}\n"), ["a message without end"]),
    ],
)
def test_what_is_wrong_is_noticed(outcome, found):
    assert faults(Case("seed"), outcome) == found


def test_what_is_left_behind_is_noticed(try_command, tmp_path, monkeypatch):
    def leave(argv):
        (tmp_path / "0" / "runs").mkdir()
        return 2

    monkeypatch.setattr(cli, "main", leave)
    assert "left behind: runs" in try_command(Case("", ("train",)), 0)
