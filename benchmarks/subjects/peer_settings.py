"""The shapes of the peers and the settings that a search tries by default. Importing this module needs no PyTorch.

Shapes are chosen by their number of parameters, which those of New-LLM are beside. The twelve settings of a search
spread over learning rates, dropouts, weight decay and the moving average.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.subjects.peer_config import PeerConfig
from newllm_jax.config import NewLLMConfig
from newllm_jax.config.checking import check
from newllm_jax.errors import InputError
from newllm_jax.files import read_json

SEARCHES = (("words", "lstm"), ("words", "gpt"), ("wikitext2", "lstm"))
SIZES = ("large", "small")
EPOCHS = {"words": (20, 40), "wikitext2": (12, 40)}  # of a trial, and of a final run
AWD = {"layers": 3, "embed": 400, "tie": True, "clip": 0.25, "batch_size": 64}

# 1,152 where AWD-LSTM has 1,150: tensor cores need multiples of 8.
SHAPES: dict[tuple[str, str, str], dict[str, Any]] = {
    ("words", "lstm", "large"): {"layers": 2, "hidden": 512, "embed": 256},
    ("words", "lstm", "small"): {"layers": 2, "hidden": 384, "embed": 128},
    ("words", "gpt", "large"): {"kind": "gpt", "layers": 6, "hidden": 256, "embed": 256, "heads": 8},
    ("words", "gpt", "small"): {"kind": "gpt", "layers": 5, "hidden": 192, "embed": 192, "heads": 6},
    ("wikitext2", "lstm", "large"): {**AWD, "hidden": 1152},
    ("wikitext2", "lstm", "small"): {**AWD, "layers": 2, "hidden": 656},
}


def task_config(task: str, dataset: str | None, rows: int) -> NewLLMConfig:
    """The configuration of New-LLM whose data a task reads.

    Args:
      dataset: Hub name, folder, file or `builtin`; None: the one that New-LLM reads by default.
      rows: examples in a batch; of a stream, rows that are read side by side.
    """
    settings: dict[str, Any] = {"batch_size": rows, **({"dataset": dataset} if dataset else {})}
    if task == "wikitext2":
        settings |= {"text": "stream", "vocabulary_size": None, "lower_case": False, "sequence_length": 71}
        settings |= {} if dataset == "builtin" else {"dataset_config": "wikitext-2-v1"}
    return NewLLMConfig.from_dict(settings)


def base_config(task: str, kind: str, size: str) -> PeerConfig:
    """The shape of a search, which its settings start from. Raises InputError where there is no such search."""
    check("kind", kind, f"lstm for the task {task}", (task, kind) in SEARCHES)
    return PeerConfig(**SHAPES[task, kind, size], epochs=EPOCHS[task][0])


def read_settings(path: str | None, task: str, kind: str, size: str) -> list[PeerConfig]:
    """The settings that a search tries: those of a JSON file (a list of objects), by default twelve.

    Raises:
      InputError: no such file, not a list of settings, two that are the same, or another kind than the search's.
    """
    base = base_config(task, kind, size)
    tried = read_json(Path(path)) if path else DEFAULTS[task, kind]
    name = path or "settings"
    check(name, tried, "a list of one or more settings", isinstance(tried, list) and len(tried) > 0)
    configs: list[PeerConfig] = []
    for number, settings in enumerate(tried, 1):
        try:
            config = base.override(settings)
            check("kind", config.kind, f"{kind}, the kind of the search", config.kind == kind)
        except InputError as error:
            raise InputError(f"{name}: setting {number}: {error}") from error
        check(name, settings, "a list of different settings", config not in configs)
        configs.append(config)
    return configs


def _lstm(learning_rate: float, dropout: float, weight_dropout: float, decay: float, ema: float) -> dict[str, Any]:
    """One rate for what layers read and give out; the embeddings have half of it."""
    return {
        "learning_rate": learning_rate, "input_dropout": dropout / 2, "between_dropout": dropout,
        "output_dropout": dropout, "weight_dropout": weight_dropout, "weight_decay": decay, "ema_decay": ema,
    }  # fmt: skip


def _gpt(learning_rate: float, dropout: float, decay: float, ema: float) -> dict[str, Any]:
    """One rate for embeddings, residual branches and attention."""
    return {
        "learning_rate": learning_rate, "input_dropout": dropout, "residual_dropout": dropout,
        "attention_dropout": dropout, "weight_decay": decay, "ema_decay": ema,
    }  # fmt: skip


def _awd(learning_rate: float, scale: float, weight_dropout: float, decay: float, ema: float) -> dict[str, Any]:
    """The rates that AWD-LSTM has on WikiText-2, times a scale, but that of the weights, which is 0.5 there."""
    return {
        "learning_rate": learning_rate, "word_dropout": 0.1 * scale, "input_dropout": 0.65 * scale,
        "between_dropout": 0.2 * scale, "output_dropout": 0.4 * scale, "weight_dropout": weight_dropout,
        "weight_decay": decay, "ema_decay": ema,
    }  # fmt: skip


DEFAULTS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("words", "lstm"): [
        _lstm(1e-3, 0.2, 0.0, 0.0, 0.0), _lstm(2e-3, 0.2, 0.0, 0.0, 0.999), _lstm(4e-3, 0.2, 0.0, 0.1, 0.999),
        _lstm(1e-3, 0.3, 0.1, 0.1, 0.999), _lstm(2e-3, 0.3, 0.1, 0.0, 0.999), _lstm(2e-3, 0.3, 0.1, 0.1, 0.0),
        _lstm(4e-3, 0.3, 0.1, 0.1, 0.999), _lstm(2e-3, 0.4, 0.1, 0.1, 0.999), _lstm(4e-3, 0.4, 0.2, 0.1, 0.999),
        _lstm(2e-3, 0.4, 0.2, 0.0, 0.999), _lstm(4e-3, 0.5, 0.2, 0.0, 0.0), _lstm(3e-3, 0.5, 0.2, 0.1, 0.999),
    ],
    ("words", "gpt"): [
        _gpt(5e-4, 0.1, 0.1, 0.999), _gpt(1e-3, 0.0, 0.1, 0.999), _gpt(1e-3, 0.1, 0.0, 0.0),
        _gpt(1e-3, 0.1, 0.1, 0.999), _gpt(2e-3, 0.1, 0.1, 0.999), _gpt(5e-4, 0.2, 0.0, 0.999),
        _gpt(1e-3, 0.2, 0.1, 0.999), _gpt(2e-3, 0.2, 0.1, 0.999), _gpt(2e-3, 0.2, 0.0, 0.0),
        _gpt(1e-3, 0.3, 0.1, 0.999), _gpt(2e-3, 0.3, 0.1, 0.999), _gpt(2e-3, 0.3, 0.1, 0.0),
    ],
    ("wikitext2", "lstm"): [
        _awd(1e-3, 0.6, 0.2, 0.0, 0.0), _awd(2e-3, 0.6, 0.2, 0.0, 0.999), _awd(4e-3, 0.6, 0.2, 0.1, 0.999),
        _awd(1e-3, 0.8, 0.2, 0.1, 0.999), _awd(2e-3, 0.8, 0.2, 0.1, 0.999), _awd(4e-3, 0.8, 0.2, 0.0, 0.999),
        _awd(2e-3, 0.8, 0.5, 0.1, 0.999), _awd(2e-3, 0.8, 0.1, 0.1, 0.0), _awd(2e-3, 1.0, 0.2, 0.0, 0.999),
        _awd(4e-3, 1.0, 0.2, 0.1, 0.999), _awd(2e-3, 1.0, 0.5, 0.1, 0.999), _awd(3e-3, 0.4, 0.1, 0.1, 0.999),
    ],
}  # fmt: skip
