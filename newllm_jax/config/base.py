"""What every training run has among its settings, and how a setting is declared and checked."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from newllm_jax.config.checking import check, checked
from newllm_jax.config.parsing import field_types, type_of
from newllm_jax.errors import InputError, shown

Fallback = Literal["builtin", "error"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
AskedPrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Schedule = Literal["constant", "cosine"]
Examples = Literal["auto", "device", "files"]
# The groups of `--help`, in its order.
Group = Literal[
    "data", "model", "stages", "stage design", "regularisation", "optimisation", "training", "memory and devices",
    "files",
]  # fmt: skip
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]

# Bounds of settings that several systems have: far above what makes sense, and so low that nothing overflows. Whether a
# run fits the machine, `training/memory.py` tells.
EPOCHS = {"least": 1, "most": 30_000}  # a line of each is in every checkpoint
BATCH = {"least": 1, "most": 2**20}
RATE = {"above": 0, "most": 1e30}  # float32 ends at 3.4e38
SOURCE = {"least": 1, "most": 4096}  # characters of a path
SAMPLE = {"least": 0, "most": 1000}  # of a report's text, which is kept in `results.json`

# What resuming may change in every system: where sources lie, what is written, and how much is computed at a time,
# which changes results by their rounding only, like another device. Not what is computed.
EVERYWHERE = (
    "checkpoint_every", "save_minutes", "time_limit", "mirror", "tracker", "profile", "micro_batch", "mesh",
    "recompute", "examples", "dataset", "dataset_config", "fallback", "sample_words",
)  # fmt: skip
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def setting(default: Any, help: str = "", group: Group | None = None, **bounds: float) -> Any:
    """A field of a configuration, with its line of `--help`, its place there, and its bounds, see `checked`.

    A field that is no option, as of `Sampling`, has neither line nor place.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "bounds": bounds})


def check_fields(settings: Any) -> None:
    """Replaces the values of a frozen dataclass by what `checked` returns of them. Raises InputError as it does."""
    types = field_types(type(settings))
    for field in dataclasses.fields(settings):
        bounds = field.metadata.get("bounds", {})
        value = checked(field.name, getattr(settings, field.name), types[field.name], **bounds)
        object.__setattr__(settings, field.name, value)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has, whatever the model.

    Attributes:
      system: its name in the files of a run.
      configurations: the folder of `configs/` that holds its named configurations.
      resumable: the settings that resuming a run may change.
    """

    system: ClassVar[str]
    configurations: ClassVar[str]
    resumable: ClassVar[frozenset[str]]

    dataset: str = setting("", "data set: Hub name, local folder or file, or builtin", "data")
    dataset_config: str = setting("", "configuration of the data set, if it has several", "data", least=0, most=200)
    fallback: Fallback = setting("builtin", "source used when the Hub is out of reach; error: stop instead", "data")
    seed: int = setting(0, "random seed for weights, data order and dropout", "training", least=0, most=2**31 - 1)
    precision: AskedPrecision = setting(
        "auto",
        "precision of matrix products; fp32: strict float32; auto: chosen by device and model",
        "memory and devices",
    )
    num_epochs: int = setting(50, "largest number of epochs", "training", **EPOCHS)
    batch_size: int = setting(32, "examples in an update", "training", **BATCH)
    micro_batch: int | None = setting(
        None, "examples computed at a time, for less memory; none: the whole batch", "memory and devices", **BATCH
    )
    mesh: str = setting(
        "auto", "devices that share the work: data=4 (examples), data=2,fsdp=2 (parameters too); auto: all that can",
        "memory and devices", least=1, most=100,
    )  # fmt: skip
    examples: Examples = setting(
        "auto",
        "where examples are read from: memory of the device, or files, piece by piece; auto: files where they are many",
        "memory and devices",
    )
    learning_rate: float = setting(1e-4, "peak learning rate", "optimisation", **RATE)
    patience: int = setting(15, "epochs without a gain after which training stops early", "training", **EPOCHS)
    minimum_gain: float = setting(
        0.0, "least fall of the validation loss that counts as a gain (nats)", "training", least=0, most=10**6
    )
    checkpoint_every: int = setting(
        5, "epochs between checkpoints kept beside the best and the latest two", "files", **EPOCHS
    )
    save_minutes: float | None = setting(
        None, "minutes between checkpoints within an epoch; none: no such checkpoints", "files", above=0, most=10**6
    )
    time_limit: str | None = setting(
        None, "time after which the run stops by itself, resumable: 11h, 90m, 3600s", "training"
    )
    mirror: str = setting(
        "",
        "folder in which a copy of the run directory is kept up to date, on Drive for instance",
        "files",
        least=0,
        most=4096,
    )
    sample_words: int = setting(
        40, "words (SmolLM2: tokens) that the report shows of text made after the first, a middle and the last epoch; "
        "0: no such text, and no checkpoint of the first epoch is kept for it", "files", **SAMPLE,
    )  # fmt: skip
    tracker: Tracker = setting("none", "also log metrics to tensorboard, wandb or trackio", "files")
    profile: bool = setting(False, "whether a trace of a few updates is kept, for TensorBoard or Perfetto", "files")

    def __post_init__(self) -> None:
        check_fields(self)
        check("micro_batch", self.micro_batch, f"at most batch_size ({self.batch_size}), or none",
              self.examples_at_once <= self.batch_size)  # fmt: skip
        check("time_limit", self.time_limit, "a time above 0, as 11h, 90m, 3600s or a number of seconds, or none",
              self.limit_seconds > 0)  # fmt: skip

    @property
    def limit_seconds(self) -> float:
        """`time_limit` in seconds: infinite where there is none, 0 where it is no time."""
        if self.time_limit is None:
            return math.inf
        number, unit = self.time_limit[:-1], UNITS.get(self.time_limit[-1:].lower())
        try:
            seconds = float(self.time_limit) if unit is None else float(number) * unit
        except ValueError:
            return 0.0
        return seconds if math.isfinite(seconds) else 0.0

    @property
    def examples_at_once(self) -> int:
        """How many examples are computed at a time: a micro batch, or a whole batch."""
        return self.micro_batch or self.batch_size

    def check_resumption(self, stored: Any, run: str) -> None:
        """Raises InputError where a run that was started with the `stored` settings cannot continue with these.

        Args:
          run: its directory, for the message.
        """
        for field in dataclasses.fields(self):
            old, new = getattr(stored, field.name), getattr(self, field.name)
            if old != new and field.name not in self.resumable:
                raise InputError(
                    f"{field.name}: {run} was trained with {shown(old)}, not {shown(new)}; a new run can have that"
                )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """A configuration from JSON or TOML values; what is not named keeps its default.

        Raises:
          InputError: an unknown field (the nearest one is named), a wrong type, or a value out of range.
        """
        return cls().override(settings)

    def override(self, settings: Mapping[str, Any]) -> Self:
        """This configuration with some fields replaced (JSON or TOML values)."""
        check("settings", settings, "a table of settings by name", isinstance(settings, Mapping))
        for name in settings:
            type_of(type(self), name)
        return dataclasses.replace(self, **settings)


Config = TypeVar("Config", bound=RunConfig)
