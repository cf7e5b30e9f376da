"""What `results.json` must hold for reports and comparisons: keys and types, for each system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig, check, checked
from newllm_jax.errors import InputError


class Text:
    """The type of an entry that is any text, with line breaks too."""


# A shape is a type as `checked` has them or Text, a list of one shape (at least one such item), or a dict of shapes by
# key.
SOURCE = {"source": str, "asked": str, "fallback": str, "fingerprint": str}
LOSS = {"epoch": int, "val_loss": float, "val_ppl": float | None}
EPOCH = {
    **LOSS, "train_loss": float, "val_accuracy": float, "learning_rate": float, "clip_norm": float | None,
    "grad_norm": float | None, "tokens_per_second": float, "seconds": float,
}  # fmt: skip
SAMPLES = [{"epoch": int, "prompt": Text, "text": Text}]
TRAINING = {"batch_size": int, "learning_rate": float, "seed": int}
CHUNKS = {"train_chunks": int, "validation_chunks": int}
RUN = {
    "name": str,
    "command": str,
    "environment": {"device": str, "platform": str, "precision": str, "jax": str, "flax": str},
    "seconds": float,
    "peak_memory_bytes": int,
}
BASED = {
    **RUN,
    "data": {**SOURCE, **CHUNKS, "train_tokens": int, "val_tokens": int},
    "base": {**SOURCE, "parameters": int, "layers": int, "val_loss": float, "val_ppl": float | None},
}
SHAPES: dict[str, dict[str, Any]] = {
    NewLLMConfig.system: {
        **RUN,
        "config": {**TRAINING, "num_layers": int, "hidden_dim": int, "context_dim": int, "embed_dim": int,
                   "schedule": str},
        "data": {**SOURCE, "train_sequences": int, "validation_sequences": int, "test_sequences": int,
                 "vocabulary_size": int, "steps_per_epoch": int},
        "parameters": int,
        "epochs": [EPOCH],
        "stopped": str,
        "best": LOSS,
        "test": {"loss": float, "ppl": float | None, "accuracy": float},
    },
    CascadeConfig.system: {
        **BASED,
        "config": {**TRAINING, **CHUNKS, "criterion": str, "hard_ratio": float, "num_stages": int, "stage_layers": int,
                   "weight_decay": float, "num_epochs": int, "patience": int, "stage_weights": str},
        "stages": [{
            "stage": int, "total_layers": int, "total_parameters": int, "threshold": float, "train_tokens": int,
            "val_tokens": int, "epochs": [EPOCH], "last": LOSS, "best": LOSS, "seconds": float,
        }],
        "ensemble": [{
            "stages": int, "parameters": int, "val_loss": float, "val_ppl": float | None, "val_accuracy": float,
            "exit_rates": [float],
            "exit_groups": [{"exit": int, "tokens": int, "base_loss": float | None, "loss": float | None}],
        }],
    },
    FinetuneConfig.system: {
        **BASED,
        "config": {**TRAINING, **CHUNKS, "weight_decay": float, "num_epochs": int, "patience": int},
        "parameters": int,
        "trained_parameters": int,
        "epochs": [EPOCH],
        "best": LOSS,
    },
}  # fmt: skip

# What results of earlier versions, or of some settings, may lack; `name[]` is every item of a list.
RECENT: dict[str, dict[str, Any]] = {
    NewLLMConfig.system: {"samples": SAMPLES},
    CascadeConfig.system: {
        "ensemble[].flops": float,
        "example": {"tokens": [Text], "exits": [int]},
        "data.test_chunks": int,
        "test": [{"stages": int, "loss": float, "ppl": float | None, "flops": float}],
    },
    FinetuneConfig.system: {
        "config.adapter": str, "config.rank": int, "config.trained_layers": int | None,
        "config.dropped_layers": tuple[int, ...], "layers": int,
        "start": {"val_loss": float, "val_ppl": float | None},
        "samples": SAMPLES,
    },
}  # fmt: skip


def check_results(results: Any, file: Path) -> None:
    """Raises InputError, naming the file and the entry, where results lack something that a report reads."""
    system = results.get("system") if isinstance(results, dict) else None
    if not isinstance(system, str) or system not in SHAPES:
        raise InputError(f"{file}: no results of a run")
    try:
        _check_shape("", results, SHAPES[system])
        for name, shape in RECENT.get(system, {}).items():
            part, _, key = name.rpartition(".")
            found = results[part.removesuffix("[]")] if part else results
            for content in found if part.endswith("[]") else [found]:
                if key in content:
                    _check_shape(name, content[key], shape)
        for key in ("base", "ensemble"):  # by these, comparisons tell what a run is
            check(
                key, results.get(key), f"absent from results of {system}", key not in results or key in SHAPES[system]
            )
        if "ensemble" in results:
            stages = [entry["stage"] for entry in results["stages"]]
            ensembles = [entry["stages"] for entry in results["ensemble"]]
            check("stages", stages, "numbered from 1", stages == list(range(1, len(stages) + 1)))
            check("ensemble", ensembles, "those with 0 to all stages", ensembles == [0, *stages])
        if "example" in results:
            tokens, exits = results["example"]["tokens"], results["example"]["exits"]
            check("example.exits", len(exits), f"one for each of the {len(tokens)} tokens", len(exits) == len(tokens))
            check("example.exits", min(exits), "0 or more", min(exits) >= 0)
    except InputError as error:
        raise InputError(f"{file}: damaged, or not the whole results of a run ({error})") from error


def _check_shape(name: str, content: Any, shape: Any) -> None:
    """Raises InputError, naming the entry, where JSON content has another shape."""
    if isinstance(shape, dict):
        check(name, content, "an object", isinstance(content, dict))
        for key, inner in shape.items():
            entry = f"{name}.{key}" if name else key
            if key not in content:
                raise InputError(f"{entry}: is missing")
            _check_shape(entry, content[key], inner)
    elif isinstance(shape, list):
        check(name, content, "a list that is not empty", isinstance(content, list) and len(content) > 0)
        for number, item in enumerate(content):
            _check_shape(f"{name}[{number}]", item, shape[0])
    elif shape is Text:
        check(name, content, "a text", isinstance(content, str))
    else:
        checked(name, content, shape)
