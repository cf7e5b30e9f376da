"""Names of settings, and their values from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable
from typing import Any

from newllm_jax.config.checking import describe
from newllm_jax.errors import InputError, named, shown


def parse(config_class: type, name: str, text: str) -> Any:
    """The value of a field from a command line: `0.5,1.0` is a list, `none` is no value."""
    declared = type_of(config_class, name)
    try:
        return _parse(declared, text)
    except ValueError as error:
        raise InputError(f"{name}: {shown(text)} is not {describe(declared)}") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` where one of the names is close, else the names themselves."""
    names = sorted(names)
    close = difflib.get_close_matches(name[:100], names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names)}"


@functools.cache
def field_types(config_class: type) -> dict[str, Any]:
    """The declared types of the fields of a dataclass."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def type_of(config_class: type, name: Any) -> Any:
    """The declared type of a setting. Raises InputError, naming the nearest setting, where there is none."""
    declared = field_types(config_class)
    if name not in declared:
        raise InputError(f"{named(name)}: no such field{nearest(str(name), declared)}")
    return declared[name]


def _parse(declared: Any, text: str) -> Any:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is types.UnionType:
        return None if text.lower() == "none" else _parse(arguments[0], text)
    if origin is tuple:
        return tuple(_parse(arguments[0], item) for item in text.split(",") if item.strip())
    if declared is bool:
        return {"true": True, "false": False}.get(text.lower(), text)  # `checked` refuses any other text
    return declared(text) if declared in (int, float) else text
