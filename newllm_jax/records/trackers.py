"""Where else the metrics of a run can go: TensorBoard or Weights & Biases, each an extra of the package."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

from newllm_jax.errors import InputError
from newllm_jax.processes import is_first
from newllm_jax.records.directory import RunDir


class Tracker(Protocol):
    """Takes the metrics of one epoch after another."""

    def log(self, entry: dict[str, Any]) -> None:
        """Logs one epoch."""

    def close(self) -> None:
        """Writes what is still pending."""


class NoTracker:
    """Logs nowhere."""

    def log(self, entry: dict[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class TensorBoardTracker:
    """Scalars in `RUN_DIR/tensorboard`."""

    def __init__(self, run: RunDir) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            raise InputError("tracker: tensorboard needs the extra newllm-jax[tensorboard]") from error
        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, entry: dict[str, Any]) -> None:
        """Logs every number of the epoch."""
        for name, value in entry.items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, entry["epoch"])

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class WandbTracker:
    """A run of the project `newllm_jax`, resumed under the run directory's name."""

    def __init__(self, run: RunDir, config: dict[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found]
        except ModuleNotFoundError as error:
            raise InputError("tracker: wandb needs the extra newllm-jax[wandb]") from error
        try:
            self._run = wandb.init(
                project="newllm_jax", id=run.path.name, dir=str(run.path), config=config, resume="allow"
            )
        except Exception as error:  # no account, no network: wandb has an error of its own for each
            raise InputError(f"tracker: wandb cannot start ({error})") from error

    def log(self, entry: dict[str, Any]) -> None:
        """Logs every number of the epoch."""
        self._run.log({name: value for name, value in entry.items() if name != "epoch"}, step=entry["epoch"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def check_tracker(name: str) -> None:
    """Raises InputError where the package of a tracker is not installed: before a run has cost anything."""
    package = {"tensorboard": "tensorboardX", "wandb": "wandb"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise InputError(f"tracker: {name} needs the extra newllm-jax[{name}]")


def open_tracker(name: str, run: RunDir, config: dict[str, Any]) -> Tracker:
    """The tracker of a configuration.

    Raises:
      InputError: its package is not installed.
    """
    if not is_first():
        return NoTracker()
    if name == "tensorboard":
        return TensorBoardTracker(run)
    return WandbTracker(run, config) if name == "wandb" else NoTracker()
