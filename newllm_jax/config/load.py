"""Configurations by name or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from newllm_jax.config.base import Config
from newllm_jax.config.newllm import NewLLMConfig
from newllm_jax.config.parsing import nearest
from newllm_jax.errors import InputError
from newllm_jax.files import read_json, read_toml

_PACKAGE = Path(__file__).parent.parent


def config_names(system: str) -> list[str]:
    """The names of the configurations that come with the package for `"newllm"`, `"cascade"` or `"finetune"`."""
    return sorted(path.stem for path in (_config_folder() / system).glob("*.toml"))


def load_config(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    config_class: type[Config] = NewLLMConfig,
) -> Config:
    """A configuration by its name (`advanced`), or from a TOML or JSON file, with some fields replaced.

    Raises:
      InputError: unknown name or field (the nearest is named), unreadable file, wrong type, value out of range.
    """
    system = config_class.configurations
    path = Path(name)
    if path.suffix not in {".toml", ".json"}:
        if name not in config_names(system):
            raise InputError(f"config: no configuration {name!r}{nearest(name, config_names(system))}")
        path = _config_folder() / system / f"{name}.toml"
    settings = read_json(path) if path.suffix == ".json" else read_toml(path)
    if not isinstance(settings, dict):
        raise InputError(f"config: {path} holds no settings (a table of field = value is expected)")
    try:
        return config_class.from_dict({**settings, **(overrides or {})})
    except InputError as error:
        culprit = str(error).split(":", 1)[0]
        if culprit in settings and culprit not in (overrides or {}):
            raise InputError(f"{path}: {error}") from error
        raise


def _config_folder() -> Path:
    """`configs/` of a wheel lies inside the package; of a checkout, beside it."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"
