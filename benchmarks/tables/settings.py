"""The tables of settings in docs/reference.md, from the classes of `newllm_jax.config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig, RunConfig
from newllm_jax.config.checking import describe
from newllm_jax.config.parsing import field_types


def settings_table(config: type[RunConfig]) -> str:
    """One line a setting, in the order of `--help`."""
    types, resumable = field_types(config), config.resumable
    lines = ["| setting | default | values | what it is | may change in `--resume` |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(config):
        declared, bounds = types[field.name], field.metadata["bounds"]
        values = describe(declared).removeprefix("one of ") + _bounds(bounds, declared)
        cells = [f"`{field.name}`", _typed(field.default), values, field.metadata["help"],
                 "yes" if field.name in resumable else ""]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _typed(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "`none`"
    if isinstance(value, tuple):
        return f"`{','.join(f'{item:g}' for item in value)}`" if value else "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "empty"


def _bounds(bounds: dict[str, float], declared: Any) -> str:
    """What a number must keep to; a text's bounds are those of its length, which nobody meets."""
    if declared is str:
        return ""
    words = {"least": "from", "above": "above", "most": "to", "below": "below"}
    said = [f"{words[name]} {bounds[name]:,}" for name in words if name in bounds and bounds[name] <= 2**31]
    return f", {' '.join(said)}" if said else ""


SETTINGS_TABLES: dict[str, Callable[[], str]] = {
    f"settings {config.__name__}": partial(settings_table, config)
    for config in (NewLLMConfig, CascadeConfig, FinetuneConfig)
}
