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
    "cli": {"commands", "programs", "config", "errors"},
    "programs": {"sources", "errors"},
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


HEAVY = {"jax", "flax", "optax", "orbax", "datasets", "transformers", "matplotlib", "tokenizers", "huggingface_hub"}


def heavy_modules(code: str, *argv: str) -> set[str]:
    """Which heavy packages a process has imported at its end."""
    code = f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {code}"
    ran = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return HEAVY & set(ran.stderr.split())


COMMAND = "from newllm_jax.cli.process import main; sys.exit(main(sys.argv[1:]))"


def test_import_is_light():
    assert heavy_modules("import newllm_jax") == set()


@pytest.mark.parametrize("typed", [["--help"], ["train", "--help"], ["finetune", "--help"], ["compare", "--help"]])
def test_help_is_light(typed):
    assert heavy_modules(COMMAND, *typed) == set()


def test_a_dry_run_imports_what_it_needs(options):
    heavy_modules(COMMAND, *options, "--dry_run")  # prepares the data
    assert heavy_modules(COMMAND, *options, "--dry_run") == {"jax", "flax", "optax"}


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = newllm_jax.nonsense
