"""Configurations by name or from a file."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from newllm_jax.config.base import Config, RunConfig
from newllm_jax.config.checking import check, checked_path
from newllm_jax.config.newllm import NewLLMConfig
from newllm_jax.config.parsing import field_types, nearest
from newllm_jax.errors import InputError, named, shown
from newllm_jax.files import read_json, read_toml

_PACKAGE = Path(__file__).parent.parent


def config_names(system: str) -> list[str]:
    """The names of the configurations that come with the package for `"newllm"`, `"cascade"` or `"finetune"`."""
    return sorted(path.stem for path in (_config_folder() / system).glob("*.toml"))


def load_config(
    name: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    config_class: type[Config] = NewLLMConfig,
) -> Config:
    """A configuration by its name (`advanced`), or from a TOML or JSON file, with some fields replaced.

    Raises:
      InputError: unknown name or field (the nearest is named), unreadable file, wrong type, value out of range.

    >>> config = load_config("advanced", {"num_epochs": 5, "dataset": "builtin"})
    >>> config.num_epochs, config.sequence_length
    (5, 64)
    >>> load_config("advanced", {"num_epoch": 5})
    Traceback (most recent call last):
    newllm_jax.errors.InputError: num_epoch: no such field; did you mean num_epochs?
    """
    check("config_class", config_class, "the class of a system's settings",
          isinstance(config_class, type) and issubclass(config_class, RunConfig))  # fmt: skip
    overrides = {} if overrides is None else overrides
    check("overrides", overrides, "a table of settings by name", isinstance(overrides, Mapping))
    path, system = checked_path("config", name), config_class.configurations
    if path.suffix not in {".toml", ".json"}:
        if str(path) not in config_names(system):
            raise InputError(f"config: no configuration {shown(str(path))}{nearest(str(path), config_names(system))}")
        path = _config_folder() / system / f"{path}.toml"
    settings = read_json(path) if path.suffix == ".json" else read_toml(path)
    if not isinstance(settings, dict):
        raise InputError(f"config: {path} holds no settings (a table of field = value is expected)")
    try:
        absent = [name for name, value in settings.items() if value == "none" and _can_be_absent(config_class, name)]
        return config_class.from_dict({**settings, **dict.fromkeys(absent), **overrides})
    except InputError as error:
        culprit = str(error).split(":", 1)[0]
        if culprit in map(named, settings) and culprit not in overrides:
            raise InputError(f"{path}: {error}") from error
        raise


def _can_be_absent(config_class: type[RunConfig], name: str) -> bool:
    """Whether a setting can have no value, which TOML can only spell as the text `none`."""
    return isinstance(field_types(config_class).get(name), types.UnionType)


def _config_folder() -> Path:
    """`configs/` of a wheel lies inside the package; of a checkout, beside it."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"
