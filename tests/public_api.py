"""The public names, with their signatures and fields, as text: `python -m tests.public_api` writes `public_api.txt`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import newllm_jax

FILE = Path(__file__).with_name("public_api.txt")
OF_FLAX = {"parent", "name", "scope", "setup"}  # what it adds to a module or calls itself


def shown(value: object) -> str:
    """A default; of an object that is no literal its name or type."""
    is_literal = isinstance(value, str | int | float | tuple | None)
    return repr(value) if is_literal else getattr(value, "__name__", type(value).__name__)


def signature(function: object) -> str:
    """Parameters but `self`, with annotations as they are written, and defaults."""
    found, texts, is_named = inspect.signature(function), [], False  # type: ignore[arg-type]
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not is_named:
            texts, is_named = [*texts, "*"], True
        default = "" if parameter.default is parameter.empty else f" = {shown(parameter.default)}"
        texts.append(f"{parameter.name}: {parameter.annotation}{default}")
    return f"({', '.join(texts)}) -> {found.return_annotation}"


def members(kind: type) -> Iterator[str]:
    """The fields of a dataclass, then the methods and properties that our classes declare, in alphabetical order."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    for field in fields:
        if field.name not in OF_FLAX:
            default = "" if field.default is dataclasses.MISSING else f" = {shown(field.default)}"
            yield f"{field.name}: {field.type}{default}"
    ours = [base for base in kind.__mro__ if base.__module__.startswith("newllm_jax")]
    for name in sorted({name for base in ours for name in vars(base)} - {field.name for field in fields} - OF_FLAX):
        value = inspect.getattr_static(kind, name)
        function = getattr(value, "__func__", value)
        if isinstance(value, property):
            yield f"{name} -> {inspect.signature(value.fget).return_annotation}"  # type: ignore[arg-type]
        elif inspect.isfunction(function) and (not name.startswith("_") or name == "__call__"):
            yield f"{name}{signature(function)}"


def public_api() -> str:
    """A block for each name, in alphabetical order."""
    blocks = []
    for name in sorted(newllm_jax.__all__):
        value = getattr(newllm_jax, name)
        if inspect.isclass(value):
            bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
            lines = [f"class {name}({bases})", *members(value)]
        elif isinstance(value, ModuleType):
            own = {key: each for key, each in vars(value).items() if getattr(each, "__module__", "") == value.__name__}
            functions = (f"{key}{signature(each)}" for key, each in sorted(own.items()) if not key.startswith("_"))
            lines = [f"module {name}", *functions]
        else:
            lines = [f"function {name}{signature(value)}"]
        blocks.append("\n    ".join(lines))
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    FILE.write_text(public_api())
