"""The members of a sweep: every combination of some values of some settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from newllm_jax.config import NewLLMConfig, check, parse
from newllm_jax.config.parsing import field_types, type_of
from newllm_jax.errors import InputError, named

MOST_MEMBERS = 1000
LONGEST_FOLDER = 150  # characters
# Of one process, one directory or the data on the device, and a member has none of them to itself.
NO_SWEEP = ("mirror", "save_minutes", "tracker", "examples", "profile")
NO_MEMBER = {"sample_words": 0}  # what the members of a sweep go without
COMMON = ("time_limit", "fallback")  # of a sweep as a whole


@dataclass(frozen=True, eq=False)
class GridMember:
    """One combination.

    Attributes:
      number: its place in the grid, from 1.
      settings: those that differ among members.
      config: all of them.
    """

    number: int
    settings: dict[str, Any]
    config: NewLLMConfig

    @property
    def name(self) -> str:
        """The settings that differ among members: `learning_rate=0.001, seed=2`."""
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.settings.items()) or "the only member"

    @property
    def folder(self) -> str:
        """A file name that tells it."""
        told = ",".join(f"{name}={_shown(value)}" for name, value in self.settings.items())
        told = re.sub(r"[^\w.=+,-]+", "_", told, flags=re.ASCII)
        return f"{self.number:03}-{told}"[:LONGEST_FOLDER].rstrip("-")


def grid_members(config: NewLLMConfig, grid: Mapping[str, Sequence[Any]]) -> list[GridMember]:
    """All combinations, the last setting of a configuration (the seed before all others) changing fastest.

    Args:
      config: the settings that are not in the grid.
      grid: the values of each setting; a single one is common to all members.

    Raises:
      InputError: a setting that there is not, that no sweep has, or whose values are none, wrong or twice the same.
    """
    check("grid", grid, "values by setting", isinstance(grid, Mapping))
    for name, values in grid.items():
        check(str(name), values, "a list of values", isinstance(values, Sequence) and not isinstance(values, str))
        check(str(name), values, "one value at least", len(values) > 0)
        type_of(NewLLMConfig, name)  # raises InputError where there is no such setting
        if name in (*NO_SWEEP, *NO_MEMBER) or (name in COMMON and len(values) > 1):
            raise InputError(f"{name}: does not go with a sweep, whose members share one process")
    for name in NO_SWEEP:
        check(name, getattr(config, name), "left as it is by default in a sweep, whose members share one process",
              getattr(config, name) == getattr(NewLLMConfig(), name))  # fmt: skip
    names = [field.name for field in dataclasses.fields(NewLLMConfig) if field.name in grid and field.name != "seed"]
    names += ["seed"] if "seed" in grid else []
    varied = [name for name in names if len(grid[name]) > 1]
    config, members, count = config.override(NO_MEMBER), list[GridMember](), 1
    for name in names:
        count *= len(grid[name])
    if count > MOST_MEMBERS:
        raise InputError(f"grid: {count:,} members are more than {MOST_MEMBERS:,}")
    for number, values in enumerate(product(*(grid[name] for name in names)), 1):
        whole = config.override(dict(zip(names, values, strict=True)))
        settings = {name: whole.to_dict()[name] for name in varied}
        for other in members:
            if other.config == whole:
                raise InputError(f"{named(', '.join(varied))}: the values of members {other.number} and {number} are "
                                 "the same")  # fmt: skip
        members.append(GridMember(number, settings, whole))
    return members


def parse_values(name: str, text: str) -> list[Any]:
    """The values of a setting from a command line: `1e-3,2e-3`; of a setting that is a list itself, `0.5,1;1,2`.

    Raises:
      InputError: a value of another type.
    """
    is_list = "tuple" in str(field_types(NewLLMConfig)[name])
    parts = text.split(";" if is_list else ",")
    return [parse(NewLLMConfig, name, part.strip()) for part in parts]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
