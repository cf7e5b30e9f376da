"""Functions fit a screen and have few parameters; kernels are exempt."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import newllm_jax

PACKAGE = Path(newllm_jax.__file__).parent
LONGEST = 70  # lines of a function, outside kernels
WIDEST = 9  # parameters of a function, `self` apart, outside kernels


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines, from `def` to the end."""
    return (function.end_lineno or 0) - function.lineno + 1


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = function.args
    every = [*names.posonlyargs, *names.args, *names.kwonlyargs, names.vararg, names.kwarg]
    return sum(name is not None and name.arg not in ("self", "cls") for name in every)


PLAIN = [path for path in sorted(PACKAGE.rglob("*.py")) if "kernel" not in path.name]


def test_functions_fit_a_screen():
    measured = [(path, each.name, length(each)) for path in PLAIN for each in functions(path)]
    long = [
        f"{path.relative_to(PACKAGE)}: {name} has {lines} lines" for path, name, lines in measured if lines > LONGEST
    ]
    assert not long, "\n".join(long)


def test_functions_have_few_parameters():
    measured = [(path, each.name, parameters(each)) for path in PLAIN for each in functions(path)]
    wide = [f"{path.relative_to(PACKAGE)}: {name} has {count}" for path, name, count in measured if count > WIDEST]
    assert not wide, "\n".join(wide)


def test_functions_are_measured(tmp_path):
    path = tmp_path / "some.py"
    path.write_text("@cache\ndef f(self, a, /, b, *c, d, **e):\n    def g():\n        pass\n")
    assert [(each.name, length(each), parameters(each)) for each in functions(path)] == [("f", 3, 5), ("g", 2, 0)]
