"""LoRA adapters as the folder that the package `peft` reads onto a Llama of transformers: configuration and tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from newllm_jax.files import whole_file
from newllm_jax.records.tensor_file import read_tree, write_tree
from newllm_jax.smollm.lora import SCALE
from newllm_jax.smollm.weights import SAFETENSORS, TENSOR_NAMES
from newllm_jax.training.step import Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(folder: Path, adapters: Params, base: str | None, layers: int) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` (float32).

    Args:
      adapters: of the last layers of a model, see `init_adapters`.
      base: the name of the model that they are for; None where no source has it.
      layers: how many that model has.
    """
    kernels: dict[str, Any] = flatten_dict(jax.device_get(adapters), sep="/")
    adapted, _, rank = kernels["attention/q_proj/a"].shape
    numbers, tensors = range(layers - adapted, layers), dict[str, np.ndarray]()
    for kernel, stacked in kernels.items():
        tensors |= dict(zip(_names(kernel, numbers), np.swapaxes(stacked, 1, 2), strict=True))  # files hold [out, in]
    write_tree(folder / TENSORS, tensors)
    names = sorted({kernel.split("/")[1] for kernel in kernels})
    config = adapter_config(base, rank, names, None if adapted == layers else list(numbers))
    with whole_file(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path, shapes: Params, layers: int) -> Params:
    """The adapters in a folder of `save_adapter`.

    Args:
      shapes: theirs, see `init_adapters`.
      layers: how many the model has.

    Raises:
      InputError: as `read_tree` does.
    """
    flat: dict[str, Any] = flatten_dict(shapes, sep="/")
    names = {kernel: _names(kernel, range(layers - leaf.shape[0], layers)) for kernel, leaf in flat.items()}
    like = {
        name: jax.ShapeDtypeStruct(flat[kernel].shape[:0:-1], np.float32) for kernel in names for name in names[kernel]
    }
    tensors = read_tree(folder / TENSORS, like)
    return unflatten_dict({kernel: np.stack([tensors[name].T for name in names[kernel]]) for kernel in names}, sep="/")


def _names(kernel: str, layers: Iterable[int]) -> list[str]:
    """The tensors of an adapted kernel (`attention/q_proj/a`), one a layer."""
    kernel, _, letter = kernel.rpartition("/")
    name = TENSOR_NAMES[f"backbone/blocks/{kernel}/kernel"][SAFETENSORS].removesuffix(".weight")
    return [f"base_model.model.{name}.lora_{letter.upper()}.weight".format(layer=layer) for layer in layers]


def adapter_config(base: str | None, rank: int, kernels: list[str], layers: list[int] | None) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Args:
      kernels: which kernels of a layer are adapted, as transformers names them.
      layers: which layers are adapted; None: all of them.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": kernels,
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else "layers",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
