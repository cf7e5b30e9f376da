"""The rules of the house, kept over the syntax tree: imports go down, the two wings never meet."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import newllm_jax

PACKAGE = Path(newllm_jax.__file__).parent
# What each room may import, from the top of the house to the bottom.
BELOW = {
    "cli": {"commands", "config", "errors"},
    "commands": {"runs", "sampling", "newllm", "cascade", "training", "report", "sources", "config", "errors"},
    "__main__": {"cli"},
    "runs": {"newllm", "cascade", "sampling", "report", "errors"},
    "newllm": {"sampling", "training", "report", "sources", "config", "errors"},
    "cascade": {"sampling", "training", "report", "sources", "config", "errors"},
    "sampling": {"config", "errors"},
    "training": {"config", "errors"},
    "report": {"sources", "config", "errors"},
    "sources": {"config", "errors"},
    "config": {"errors"},
    "errors": set(),
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("newllm_jax."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    if room == "__init__":
        return  # the public names are imported lazily, from anywhere
    assert imported_rooms(ast.parse(path.read_text())) - {room} <= BELOW[room]


def test_only_the_command_line_sets_up_jax():
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) != "cli":
            assert not re.search(r"\bjax\.config\b", path.read_text()), path


@pytest.mark.parametrize("name", newllm_jax.__all__)
def test_public_names_are_there_and_documented(name):
    assert getattr(newllm_jax, name).__doc__


def test_import_is_light():
    heavy = "jax", "flax", "optax", "orbax", "datasets", "transformers", "matplotlib", "rich"
    code = f"import sys, newllm_jax; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = newllm_jax.nonsense
