"""The types and ranges of settings and arguments, and how a value that breaks them is named."""

from __future__ import annotations

import math
import numbers
import operator
import os
import types
import typing
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, SupportsIndex

from newllm_jax.errors import InputError, shown

BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
INVISIBLE = ("Cc", "Cs")  # control characters and halves of surrogate pairs, which no table and no UTF-8 file can hold


def check(name: str, value: Any, rule: str, holds: bool) -> None:
    """Raises InputError naming a setting or argument, its value and the rule it breaks."""
    if not holds:
        raise InputError(f"{name}: must be {rule}, not {shown(value)}")


def checked(name: str, value: Any, declared: Any, **bounds: float) -> Any:
    """A value in its declared type: an integer of NumPy becomes Python's, a list a tuple.

    Args:
      declared: int, float, bool, str, a Literal of texts, `tuple[..., ...]` of one of these, or one of them or None.
      bounds: `least` or `above`, `most` or `below`: of a number, of each number of a list, of the length of a text.

    Raises:
      InputError: another type, a number out of bounds, or a text that no report can show.
    """
    if typing.get_origin(declared) is Literal:
        choices = typing.get_args(declared)
        check(name, value, "one of " + ", ".join(choices), isinstance(value, str) and value in choices)
        return value
    try:
        converted = _convert(declared, value)
    except TypeError as error:
        raise InputError(f"{name}: {shown(value)} is not {describe(declared)}") from error
    within = all(BOUNDS[bound][1](number, end) for bound, end in bounds.items() for number in _measured(converted))
    check(name, converted, _rule(declared, bounds), within)
    if declared is str:
        visible = all(unicodedata.category(letter) not in INVISIBLE for letter in converted)
        check(name, converted, "a text without control characters, in UTF-8", visible)
    return converted


def checked_path(name: str, value: Any) -> Path:
    """A path. Raises InputError where a value is no path, is empty, or could not be shown or be made."""
    path = Path(checked(name, os.fspath(value) if isinstance(value, os.PathLike) else value, str, least=1, most=4096))
    check(
        name, value, "a path of names of at most 255 bytes", all(len(os.fsencode(part)) <= 255 for part in path.parts)
    )
    return path


def expanded(name: str, value: str) -> Path:
    """A path whose `~` is the user's home. Raises InputError where there is no such user."""
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}: {shown(value)} has no home folder ({error})") from error


def check_seed(seed: Any) -> int:
    """A random seed. Raises InputError where it is none."""
    return checked("seed", seed, int, least=0, most=2**31 - 1)


def describe(declared: Any) -> str:
    """A declared type in words."""
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list of {describe(arguments[0]).removeprefix('a ').removeprefix('an ')}s"
    if origin is types.UnionType:
        return f"{describe(arguments[0])} or none"
    return {int: "an integer", float: "a number", str: "a text", bool: "true or false"}[declared]


def _convert(declared: Any, value: Any) -> Any:
    """Raises TypeError where a value has another type."""
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is types.UnionType:  # `int | None` is the only kind in use
        return None if value is None else _convert(arguments[0], value)
    if origin is tuple and isinstance(value, Iterable) and not isinstance(value, str | bytes | Set | Mapping):
        return tuple(_convert(arguments[0], item) for item in value)
    if isinstance(value, bool) and declared is not bool:  # to Python an integer
        raise TypeError(value)
    if declared is int and isinstance(value, SupportsIndex):
        return operator.index(value)
    if declared is float and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # an integer of hundreds of digits
            return math.inf
    if declared in (str, bool) and isinstance(value, declared):
        return value
    raise TypeError(value)


def _measured(value: Any) -> Sequence[float]:
    """The numbers that bounds are for."""
    if isinstance(value, str):
        return [len(value)]
    if isinstance(value, tuple):
        return value
    return [] if value is None else [value]


def _rule(declared: Any, bounds: dict[str, float]) -> str:
    """`from 1 to 100`, `above 0 and at most 1`, `a text of 1 to 4096 characters`."""
    if set(bounds) == {"least", "most"}:
        ends = f"{bounds['least']} to {bounds['most']}"
        return f"a text of {ends} characters" if declared is str else f"from {ends}"
    return " and ".join(f"{BOUNDS[bound][0]} {end}" for bound, end in bounds.items())
