"""The rules of the house, checked in the syntax tree of each file: imports go down, and no file imports itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import newllm_jax

PACKAGE = Path(newllm_jax.__file__).parent

# The rooms of the package, from the top of the house to the bottom. A file imports from its own room and from lower
# floors; rooms of one floor import nothing of each other.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["generation"],
    ["systems"],
    ["newllm", "cascade", "finetuning"],  # the wings
    ["smollm"],
    ["report"],
    ["records", "training", "decoding", "sources"],  # these know no model
    ["bars"],  # on a terminal
    ["processes"],  # of one training
    ["config"],
    ["content"],  # hashes of arrays
    ["files"],
    ["errors"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FRONT_DOOR = "__init__.py"  # imports the public names lazily, from any floor; a file like any other where circles count
TABLES = {FRONT_DOOR, "systems.py"}  # name modules by strings without `newllm_jax.`
SMOLLM_USERS = {"smollm", "cascade", "finetuning"}


def room_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def module_files(root: Path) -> dict[str, str]:
    """The files of the package in the folder `root`, by module: `newllm_jax.config.base` is in `config/base.py`."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.relative_to(root).as_posix()
    return files


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """What a file imports, as dotted names of modules or of objects in them: on top, lazily, or for types only.

    Args:
      package: where the file's relative imports start.
    """

    def absolute(level: int, name: str) -> str:
        above = package.split(".")
        return ".".join([*above[: len(above) + 1 - level], name]) if level else name

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = absolute(node.level, node.module or "").rstrip(".")
            yield from (f"{home}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.args[0].value  # importlib.import_module(".model", __package__)
            if isinstance(name, str) and ast.unparse(node.func).endswith("import_module") and name.startswith("."):
                yield absolute(len(name) - len(name.lstrip(".")), name.lstrip("."))


def imported_files(file: str, root: Path, files: dict[str, str]) -> set[str]:
    """The files of the package that one of them imports, by statements and by strings that name a module.

    `newllm_jax.config.base` and `newllm_jax.config.base:check` name one wherever they stand, in the files with tables
    `config.base` and `config.base:check` too.
    """
    tree = ast.parse((root / file).read_text())
    package = ".".join([root.name, *Path(file).parent.parts])
    imported = set()
    for name in imported_names(tree, package):
        if name.split(".")[0] == root.name:
            while name not in files:  # an object: the module that it is in
                name = name.rpartition(".")[0]
            imported.add(files[name])
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.replace(":", ".").rstrip(".")  # f"newllm_jax.config.{name}" ends in a dot
            if file in TABLES and not name.startswith(f"{root.name}."):
                name = f"{root.name}.{name}"
            home = name.rpartition(".")[0]
            if name in files and name != root.name:
                imported.add(files[name])
            elif home in files and not files[home].endswith("__init__.py"):
                imported.add(files[home])
    return imported


def broken_rule(importer: str, imported: str) -> str | None:
    """Which rule forbids a room to import another."""
    if importer == imported:
        return None
    if FLOOR[importer] > FLOOR[imported]:
        return "imports go down"
    if FLOOR[importer] == FLOOR[imported]:
        return f"{', '.join(FLOORS[FLOOR[importer]])} import nothing of each other"
    if imported == "smollm" and importer not in SMOLLM_USERS:
        return "only cascade and finetuning use smollm"
    return None


def circles(imports: dict[str, set[str]]) -> Iterator[list[str]]:
    """Circles of files that import each other: for each file that is the first of one by its name, a shortest one."""
    for first in sorted(imports):
        paths, reached = [[first]], set()
        while paths and first not in reached:
            path = paths.pop(0)
            for file in sorted(imports[path[-1]] - reached):
                if file == first:
                    yield [*path, first]
                if file >= first:
                    reached.add(file)
                    paths.append([*path, file])
                if file == first:
                    break


def violations(root: Path) -> list[str]:
    """What breaks the rules of the house in the package in the folder `root`, a line each."""
    files = module_files(root)
    imports = {file: imported_files(file, root, files) for file in files.values()}
    strangers = sorted({room_of(file) for file in imports} - FLOOR.keys() - {"__init__"})
    found = [f"{room}: has no floor in FLOORS" for room in strangers]
    for file in sorted(imports):
        for other in sorted(imports[file]):
            rooms = room_of(file), room_of(other)
            rule = broken_rule(*rooms) if FLOOR.keys() >= set(rooms) else None
            if rule:
                found.append(f"{file} -> {other}: {rule}")
    return found + [f"{' -> '.join(circle)}: a circle of files" for circle in circles(imports)]


def test_imports_go_down():
    assert not (found := violations(PACKAGE)), "\n".join(found)


HOUSE = {  # a small package without a fault
    "__init__.py": '_HOMES = {"Model": "newllm.model"}',
    "cli/commands.py": "from newllm_jax import systems",
    "cli/process.py": "",
    "systems.py": 'ROWS = {"new-llm": "newllm.model:Model", "cascade": "cascade.run:train"}\nname = "config.json"',
    "newllm/__init__.py": "",
    "newllm/model.py": "from newllm_jax.training.step import update\nfrom .loss import loss",
    "newllm/loss.py": "from ..errors import InputError\nsuffix = '.model'",
    "cascade/__init__.py": "",
    "cascade/run.py": "from newllm_jax.smollm import model\nfrom newllm_jax.config import Config",
    "finetuning/experiment.py": "from newllm_jax.smollm.model import SmolLM2",
    "smollm/model.py": "def forward():\n    from newllm_jax.config import Config",
    "report/tables.py": "from newllm_jax.records.directory import RunDir",
    "records/directory.py": "from newllm_jax.files import whole_file",
    "training/step.py": "from newllm_jax.config.base import Config",
    "config/__init__.py": "from newllm_jax.config.base import Config",
    "config/base.py": '"""Not newllm_jax.newllm.model."""\nfrom newllm_jax import errors',
    "files.py": "",
    "errors.py": "",
}


@pytest.fixture
def house(tmp_path):
    """Writes the small package with other contents for some of its files, and checks it."""

    def check(**changed):
        root = tmp_path / "newllm_jax"
        for file, content in (HOUSE | changed).items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(content)
        return violations(root)

    return check


def test_a_house_in_order(house):
    assert house() == []


UP = "records/directory.py -> newllm/model.py: imports go down"
WINGS = "newllm, cascade, finetuning import nothing of each other"
PEERS = "records, training, decoding, sources import nothing of each other"


@pytest.mark.parametrize(
    "statement",
    [
        "from newllm_jax.newllm.model import Model",
        "from newllm_jax.newllm import model",
        "from newllm_jax.newllm.model import *",
        "import newllm_jax.newllm.model",
        "import os, newllm_jax.newllm.model as model",
        "from ..newllm import model",
        "from ..newllm.model import Model",
        "def late():\n    from newllm_jax.newllm.model import Model",
        "class Run:\n    def late(self):\n        import newllm_jax.newllm.model",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from newllm_jax.newllm.model import Model",
        "import importlib\nmodel = importlib.import_module('newllm_jax.newllm.model')",
        "from importlib import import_module\nmodel = import_module('..newllm.model', __package__)",
        "import pkgutil\nModel = pkgutil.resolve_name('newllm_jax.newllm.model:Model')",
        "HOMES = {'Model': 'newllm_jax.newllm.model.Model'}",
    ],
)
def test_an_upward_import_is_found(house, statement):
    assert house(**{"records/directory.py": statement}) == [UP]


def test_a_module_built_of_a_string_is_found(house):
    found = house(**{"records/directory.py": "name = 'model'\nhome = f'newllm_jax.newllm.{name}'"})
    assert found == ["records/directory.py -> newllm/__init__.py: imports go down"]


@pytest.mark.parametrize(
    ("file", "statement", "imported", "rule"),
    [
        ("newllm/loss.py", "import newllm_jax.cascade.run", "cascade/run.py", WINGS),
        ("finetuning/experiment.py", "from ..cascade.run import train", "cascade/run.py", WINGS),
        ("training/step.py", "from newllm_jax.records import directory", "records/directory.py", PEERS),
        (
            "newllm/loss.py",
            "import newllm_jax.smollm.model",
            "smollm/model.py",
            "only cascade and finetuning use smollm",
        ),
        ("systems.py", "ROWS = {'new-llm': 'cli.process:main'}", "cli/process.py", "imports go down"),
        ("errors.py", "from newllm_jax.files import whole_file", "files.py", "imports go down"),
    ],
)
def test_a_forbidden_room_is_found(house, file, statement, imported, rule):
    assert house(**{file: statement}) == [f"{file} -> {imported}: {rule}"]


def test_a_room_without_a_floor_is_found(house):
    assert house(**{"attic/box.py": ""}) == ["attic: has no floor in FLOORS"]


@pytest.mark.parametrize(
    ("changed", "circle"),
    [
        (
            {"newllm/loss.py": "def late():\n    from newllm_jax.newllm.model import Model"},
            "newllm/loss.py -> newllm/model.py -> newllm/loss.py",
        ),
        (
            {"config/base.py": "from .load import a", "config/load.py": "from newllm_jax.config import Config"},
            "config/__init__.py -> config/base.py -> config/load.py -> config/__init__.py",
        ),
        ({"files.py": "import newllm_jax.files"}, "files.py -> files.py"),
        ({"newllm/loss.py": "import newllm_jax"}, "__init__.py -> newllm/model.py -> newllm/loss.py -> __init__.py"),
    ],
)
def test_a_circle_of_files_is_found(house, changed, circle):
    assert house(**changed) == [f"{circle}: a circle of files"]


def test_only_the_command_line_sets_up_jax():
    for path in PACKAGE.rglob("*.py"):
        if room_of(path.relative_to(PACKAGE).as_posix()) != "cli":
            assert not re.search(r"\bjax\.config\b", path.read_text()), path


@pytest.mark.parametrize("name", newllm_jax.__all__)
def test_public_names_are_there_and_documented(name):
    assert getattr(newllm_jax, name).__doc__


HEAVY = {
    "jax",
    "flax",
    "optax",
    "orbax",
    "grain",
    "datasets",
    "transformers",
    "matplotlib",
    "tokenizers",
    "huggingface_hub",
}


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
