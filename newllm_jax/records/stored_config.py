"""What a run was started with, and what resuming it may change."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from newllm_jax.config import Config, check, checked, checked_path, expanded
from newllm_jax.errors import InputError, Note
from newllm_jax.processes import by_first
from newllm_jax.records.directory import RunDir
from newllm_jax.records.mirror import fetch_run
from newllm_jax.records.trackers import check_tracker


def stored_config(run: RunDir, config_class: type[Config]) -> Config:
    """The configuration that a run was started with.

    Raises:
      InputError: a run of another system, or a damaged file.
    """
    if run.description.get("system") != config_class.system:
        raise InputError(f"{run.path}: not a {config_class.system} run")
    settings: Any = run.description.get("config")
    try:
        return config_class.from_dict(settings)
    except InputError as error:
        raise InputError(f"{run.path / 'config.json'}: damaged ({error})") from error


def resume_or_start(
    stack: ExitStack,
    resume: str | Path | None,
    config: Config | None,
    config_class: type[Config],
    overrides: Mapping[str, Any] | None,
) -> tuple[RunDir | None, Config]:
    """The run directory to continue, held open by `stack`, or None for a new run; and the configuration.

    Args:
      config: of a new run; None for the defaults.
      config_class: the system's.
      overrides: settings to change: any for a new run, the `resumable` ones for another. A mirror is asked for anew
        whenever a run is resumed.

    Raises:
      InputError: a setting or directory that cannot be used, an override that would make a run another experiment (the
        field and both values are named), or a tracker that is not installed.
    """
    check("config", config, f"a {config_class.__name__}", config is None or isinstance(config, config_class))
    run, overrides = None, {} if overrides is None else overrides
    check("overrides", overrides, "a table of settings by name", isinstance(overrides, Mapping))
    if resume is None:
        config = (config or config_class()).override(overrides)
    else:
        resume = checked_path("run_dir", resume)
        mirror = checked("mirror", overrides.get("mirror", ""), str)
        by_first(partial(fetch_run, resume, mirror))
        run = stack.enter_context(RunDir.open(resume))
        stored = stored_config(run, config_class)
        config = stored.override({"mirror": "", **overrides})  # of a stranger's run it would be any folder of the user
        config.check_resumption(stored, str(run.path))
        is_mirror = bool(stored.mirror) and expanded("mirror", stored.mirror).resolve() == run.path.resolve().parent
        if stored.mirror and not config.mirror and not is_mirror:
            warnings.warn(
                f"{run.path} had a mirror in {stored.mirror}; --mirror keeps it up to date", Note, stacklevel=2
            )
    check_tracker(config.tracker)
    return run, config
