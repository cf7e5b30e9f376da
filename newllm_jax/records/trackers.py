"""Where else the metrics of a run can go: TensorBoard, Weights & Biases or Trackio, each an extra of the package.

The names are the same in each, those of the lines of `metrics.jsonl`, and a step is an epoch:

    train_loss, val_loss (nats), val_ppl, val_accuracy, learning_rate, clip_norm, grad_norm, tokens_per_second, seconds
    skipped_updates (fp16)

A run of CASCADE has them once a stage, as `stage_1/train_loss`; its epochs are counted on from stage to stage.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import redirect_stdout
from typing import Any, Protocol

from newllm_jax.content import finite
from newllm_jax.errors import InputError
from newllm_jax.processes import is_first
from newllm_jax.records.directory import RunDir

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}  # that each extra installs


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
        SummaryWriter = _package("tensorboard").SummaryWriter
        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, entry: dict[str, Any]) -> None:
        """Logs every number of the epoch."""
        for name, value in scalars(entry).items():
            self._writer.add_scalar(name, value, entry["epoch"])

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class ServiceTracker:
    """A run of the project `newllm_jax` in Weights & Biases or Trackio, under the run directory's name.

    A run that is resumed goes on in the tracker too. Trackio keeps what it is given in its own folder on this machine
    (`TRACKIO_DIR`, else `trackio` in the cache of the Hugging Face Hub) rather than beside the run: it reads that
    variable once, when it is imported, and `trackio show` compares all runs that lie there.
    """

    def __init__(self, name: str, run: RunDir, config: dict[str, Any]) -> None:
        package, label = _package(name), run.path.name
        own = {
            "wandb": {"id": label, "dir": str(run.path)},
            # Neither a dashboard in the notebook nor the load of the machine: the same metrics as in the others.
            "trackio": {"name": label, "embed": False, "auto_log_gpu": False, "auto_log_cpu": False},
        }[name]
        try:
            with redirect_stdout(sys.stderr):  # where it says what it does: stdout is for the run
                self._run = package.init(project="newllm_jax", config=config, resume="allow", **own)
        except Exception as error:  # no account, no network, a full disk: each package has errors of its own
            raise InputError(f"tracker: {name} cannot start ({error})") from error

    def log(self, entry: dict[str, Any]) -> None:
        """Logs every number of the epoch."""
        self._run.log(scalars(entry), step=entry["epoch"])

    def close(self) -> None:
        """Ends the run, after all of it was taken."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """The metrics of an epoch as every tracker has them: by the names above, without what is no finite number."""
    return {name: value for name, value in finite(entry).items() if name != "epoch" and value is not None}


def check_tracker(name: str) -> None:
    """Raises InputError where the package of a tracker is not installed: before a run has cost anything."""
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        raise InputError(f"tracker: {name} needs the extra newllm-jax[{name}]")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGES[name])
    except ModuleNotFoundError as error:
        raise InputError(f"tracker: {name} needs the extra newllm-jax[{name}]") from error


def open_tracker(name: str, run: RunDir, config: dict[str, Any]) -> Tracker:
    """The tracker of a configuration.

    Raises:
      InputError: its package is not installed, or cannot start.
    """
    if not is_first() or name == "none":
        return NoTracker()
    return TensorBoardTracker(run) if name == "tensorboard" else ServiceTracker(name, run, config)
