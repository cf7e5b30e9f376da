"""What a run was started with, and what resuming it may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from newllm_jax.config import Config
from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir


def stored_config(run: RunDir, config_class: type[Config]) -> Config:
    """The configuration that a run was started with.

    Raises:
      InputError: a run of another system, or a damaged file.
    """
    content = run.read_json("config.json")
    if not isinstance(content, dict) or content.get("system") != config_class.system:
        raise InputError(f"{run.path}: not a {config_class.system} run")
    try:
        return config_class.from_dict(content["config"])
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run.path / 'config.json'}: damaged ({error})") from error


def resumed_config(run: RunDir, config_class: type[Config], overrides: Mapping[str, Any]) -> Config:
    """The configuration of a run with what resuming may change.

    Raises:
      InputError: an override that would make it another experiment; the field and both values are named.
    """
    stored = stored_config(run, config_class)
    asked = stored.override(overrides)
    for field in overrides:
        old, new = getattr(stored, field), getattr(asked, field)
        if old != new and field not in config_class.resumable:
            raise InputError(f"{field}: {run.path} was trained with {old!r}, not {new!r}; a new run can have that")
    return asked
