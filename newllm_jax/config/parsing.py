"""Values of settings from JSON, TOML and the command line, in the type that the setting declares."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from newllm_jax.errors import InputError


def convert(config_class: type, name: str, value: Any) -> Any:
    """A JSON or TOML value in the field's own type. Raises InputError where it has another one."""
    declared = type_of(config_class, name)
    try:
        return _convert(declared, value)
    except TypeError as error:
        raise InputError(f"{name}: {value!r} is not {_describe(declared)}") from error


def parse(config_class: type, name: str, text: str) -> Any:
    """The value of a field from a command line: `0.5,1.0` is a list, `none` is no value."""
    declared = type_of(config_class, name)
    try:
        return _parse(declared, text)
    except ValueError as error:
        raise InputError(f"{name}: {text!r} is not {_describe(declared)}") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` where one of the names is close, else the names themselves."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names)}"


def type_of(config_class: type, name: str) -> Any:
    """The declared type of a setting. Raises InputError, naming the nearest setting, where there is none."""
    declared = typing.get_type_hints(config_class)
    if name not in declared:
        raise InputError(f"{name}: no such field{nearest(name, declared)}")
    return declared[name]


def _convert(declared: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is types.UnionType:  # `int | None` is the only kind in use
        return None if value is None else _convert(arguments[0], value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item) for item in value)
    if declared is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if declared is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if (origin is Literal or declared is str) and isinstance(value, str):
        return value
    raise TypeError(value)


def _parse(declared: Any, text: str) -> Any:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is types.UnionType:
        return None if text.lower() == "none" else _parse(arguments[0], text)
    if origin is tuple:
        return tuple(_parse(arguments[0], item) for item in text.split(",") if item.strip())
    return declared(text) if declared in (int, float) else text


def _describe(declared: Any) -> str:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0]).removeprefix('a ').removeprefix('an ')}s"
    if origin is types.UnionType:
        return f"{_describe(arguments[0])} or none"
    return {int: "an integer", float: "a number", str: "a text"}[declared]
