"""What a run was started with, and what resuming it may change."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from newllm_jax.config import Config
from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir
from newllm_jax.records.trackers import check_tracker


def stored_config(run: RunDir, config_class: type[Config]) -> Config:
    """The configuration that a run was started with.

    Raises:
      InputError: a run of another system, or a damaged file.
    """
    if run.description.get("system") != config_class.system:
        raise InputError(f"{run.path}: not a {config_class.system} run")
    try:
        return config_class.from_dict(run.description["config"])
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run.path / 'config.json'}: damaged ({error})") from error


def resume_or_start(
    stack: ExitStack, resume: str | Path | None, config: Config, overrides: Mapping[str, Any] | None
) -> tuple[RunDir | None, Config]:
    """The run directory to continue, held open by `stack`, or None for a new run; and the configuration.

    Args:
      config: of a new run; of a continued one only the class matters.
      overrides: settings to change: any for a new run, the `resumable` ones for another.

    Raises:
      InputError: a setting or directory that cannot be used, an override that would make a run another experiment (the
        field and both values are named), or a tracker that is not installed.
    """
    run = None
    if resume is None:
        config = config.override(overrides or {})
    else:
        run = stack.enter_context(RunDir.open(resume))
        stored = stored_config(run, type(config))
        config = stored.override(overrides or {})
        config.check_resumption(stored, str(run.path))
    check_tracker(config.tracker)
    return run, config
