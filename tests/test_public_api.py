"""The public names: what they are does not change unnoticed, and the examples of their docstrings are true."""

from __future__ import annotations

import doctest
import inspect
import shutil

import pytest

import newllm_jax
from tests.public_api import FILE, public_api
from tests.reliability.tiny import write_base, write_rows

WITHOUT_EXAMPLE = {  # data, errors, models (`restore` and `load_smollm2` show calls of them), and trainings
    *(name for name in newllm_jax.__all__ if name.endswith(("Config", "Result", "Run", "Error"))),
    "Stopped", "ContextVectorLM", "SmolLM2", "Stage", "finetune", "train_cascade", "train_newllm",
    "extract",  # that is docs/examples/own_text.py
}  # fmt: skip


@pytest.mark.quick
def test_the_public_names_are_as_they_were():
    """Where a change is meant: `python -m tests.public_api`, and a line in CHANGELOG.md."""
    assert public_api().splitlines() == FILE.read_text().splitlines()


@pytest.fixture
def sources(small_run, corpus, tmp_path, monkeypatch):
    """The files that the examples name, in the current folder."""
    shutil.copytree(small_run, tmp_path / "runs" / "quickstart")
    shutil.copy(corpus, tmp_path / "corpus.txt")
    write_rows(tmp_path / "rows.jsonl")
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)


def examples(name: str) -> list[doctest.DocTest]:
    """The examples of a public name; of a class or module, of its members too."""
    value = getattr(newllm_jax, name)
    found = doctest.DocTestFinder().find(value, name, None if inspect.ismodule(value) else inspect.getmodule(value))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", sorted(set(newllm_jax.__all__) - WITHOUT_EXAMPLE))
def test_examples(name, sources, capsys):
    tests = examples(name)
    assert tests, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in tests:
        assert runner.run(test).failed == 0, capsys.readouterr().out


def test_a_wrong_example_is_noticed():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed == 1
