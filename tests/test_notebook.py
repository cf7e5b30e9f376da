"""The notebook runs from start to end, is committed with its outputs, and asks Colab for nothing that it replaces."""

from __future__ import annotations

import tomllib
from importlib.metadata import requires
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

from benchmarks.notebook import NOTEBOOK, execute, shown

ROOT = Path(__file__).parent.parent
# What Colab has of the packages that the notebook asks for: googlecolab/backend-info of 19 August 2026, and the
# versions that it had before.
COLAB = {
    "absl-py": ["1.4.0"], "datasets": ["4.0.0"], "filelock": ["3.32.3"], "flax": ["0.11.2"], "grain": ["0.2.18"],
    "huggingface_hub": ["1.27.0"], "jax": ["0.7.2"], "jinja2": ["3.1.6"], "markdown-it-py": ["4.2.0"],
    "matplotlib": ["3.10.0"],
    "numpy": ["2.1.3", "2.0.2"], "optax": ["0.2.8", "0.2.5"], "orbax-checkpoint": ["0.12.4", "0.11.40"],
    "pyyaml": ["6.0.3"], "requests": ["2.32.4"], "rich": ["13.9.4"], "safetensors": ["0.8.0"],
    "tokenizers": ["0.22.2"], "tqdm": ["4.67.3"], "transformers": ["5.15.0"],
}  # fmt: skip

ADDED = {"shtab"}  # which Colab has not, and which asks for nothing


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook) -> list[str]:
    """What each code cell gave, as text."""
    return ["".join(output.get("text", "") or str(output.get("data", output)) for output in cell.outputs)
            for cell in code_cells(notebook)]  # fmt: skip


def check_outputs(notebook) -> None:
    """Every cell ran, in order, and the commands ended as they should."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    given = texts(notebook)
    assert not [text for text in given if "error: " in text or "Traceback" in text]
    everything = "\n".join(given)
    assert everything.count("best        validation PPL") == 3  # before and after resuming, and of `advanced`
    assert "continuing after epoch 5" in everything and "epoch  10/10" in everything
    assert "Base+1" in everything and "tokens by exit: base" in everything
    assert sum("text/html" in output.get("data", {}) for cell in cells for output in cell.outputs) == 3
    assert "the value of" not in given[-1] and len(given[-1].split()) >= 10  # the words that follow


def test_the_notebook_runs_from_start_to_end(tmp_path):
    check_outputs(execute(tmp_path))


def test_the_committed_outputs_are_whole_and_name_no_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check_outputs(notebook)
    text = NOTEBOOK.read_text()
    assert not [path for path in ("/tmp", "/root", "/home/", "/work", "site-packages", "\\u001b[") if path in text]


def test_a_painted_terminal_is_read_as_it_looks_in_the_end():
    assert shown("a\n\x1b[2Kbar 1\r\x1b[2K\x1b[35mbar 2\x1b[0m\n\x1b[1A\x1b[2Kend\r\n") == "a\nend\n"


def test_installing_on_colab_replaces_nothing():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(each for each in requires("gguf") or [] if "extra ==" not in each)]
    assert len(asked) > 15
    for requirement in (each for each in map(Requirement, asked) if each.name not in ADDED):
        there = COLAB[requirement.name.lower()]
        assert all(version in requirement.specifier for version in there), requirement


@pytest.mark.parametrize("asked", ["flax>=0.12", "numpy>=2.1", "absl-py>=2"])
def test_a_newer_package_would_be_found(asked):
    requirement = Requirement(asked)
    assert not all(version in requirement.specifier for version in COLAB[requirement.name])
