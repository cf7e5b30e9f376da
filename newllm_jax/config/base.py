"""What every training run has among its settings, and how a setting is declared and checked."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from newllm_jax.config.parsing import convert, type_of
from newllm_jax.errors import InputError

Fallback = Literal["builtin", "error"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
AskedPrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Schedule = Literal["constant", "cosine"]
Tracker = Literal["none", "tensorboard", "wandb"]

LARGEST_BATCH = 2**20
# What resuming may change in every system: where sources lie, what is written, and how much is computed at a time,
# which changes results by their rounding only, like another device. Not what is computed.
EVERYWHERE = ("checkpoint_every", "tracker", "dataset", "dataset_config", "fallback", "micro_batch")


def check(field: str, value: Any, rule: str, holds: bool) -> None:
    """Raises InputError naming the field, its value and the rule it breaks."""
    if not holds:
        raise InputError(f"{field}: must be {rule}, not {value!r}")


def check_seed(seed: int) -> None:
    """Raises InputError where a random seed is out of range."""
    check("seed", seed, "from 0 to 2147483647", 0 <= seed < 2**31)


def setting(default: Any, help: str) -> Any:
    """A field of a configuration, with its line of `--help`."""
    return dataclasses.field(default=default, metadata={"help": help})


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

    dataset: str = setting("", "data set: Hub name, local folder or file, or builtin")
    dataset_config: str = setting("", "configuration of the data set, if it has several")
    fallback: Fallback = setting("builtin", "source used when the Hub is out of reach; error: stop instead")
    seed: int = setting(0, "random seed for weights, data order and dropout")
    precision: AskedPrecision = setting(
        "auto", "precision of matrix products; fp32: strict float32; auto: chosen by device and model"
    )
    num_epochs: int = setting(50, "largest number of epochs")
    batch_size: int = setting(32, "examples in an update")
    micro_batch: int | None = setting(None, "examples computed at a time, for less memory; none: the whole batch")
    learning_rate: float = setting(1e-4, "peak learning rate")
    patience: int = setting(15, "epochs without a gain after which training stops early")
    minimum_gain: float = setting(0.0, "least fall of the validation loss that counts as a gain (nats)")
    checkpoint_every: int = setting(5, "epochs between checkpoints kept beside the best and the latest two")
    tracker: Tracker = setting("none", "also log metrics to tensorboard or wandb")

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("num_epochs", "batch_size", "patience", "checkpoint_every"):
            check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        check("batch_size", self.batch_size, f"at most {LARGEST_BATCH}", self.batch_size <= LARGEST_BATCH)
        check("micro_batch", self.micro_batch, f"1 to batch_size ({self.batch_size}), or none",
              self.micro_batch is None or 1 <= self.micro_batch <= self.batch_size)  # fmt: skip
        check("learning_rate", self.learning_rate, "above 0 and finite", 0 < self.learning_rate < math.inf)
        check("minimum_gain", self.minimum_gain, "0 or more", 0 <= self.minimum_gain < math.inf)
        for field in dataclasses.fields(self):
            choices, value = typing.get_args(type_of(type(self), field.name)), getattr(self, field.name)
            if choices and isinstance(choices[0], str):
                check(field.name, value, "one of " + ", ".join(choices), value in choices)

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
                raise InputError(f"{field.name}: {run} was trained with {old!r}, not {new!r}; a new run can have that")

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
        fields = {name: convert(type(self), name, value) for name, value in settings.items()}
        return dataclasses.replace(self, **fields)


Config = TypeVar("Config", bound=RunConfig)
