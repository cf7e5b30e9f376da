"""LoRA adapters as the folder that the package `peft` reads onto a Llama of transformers: configuration and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from newllm_jax.files import whole_file
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
    from safetensors.numpy import save_file

    kernels: dict[str, Any] = flatten_dict(jax.device_get(adapters), sep="/")
    adapted, _, rank = kernels["attention/q_proj/a"].shape
    numbers, tensors = range(layers - adapted, layers), dict[str, np.ndarray]()
    for kernel, stacked in kernels.items():
        kernel, _, letter = kernel.rpartition("/")
        name = TENSOR_NAMES[f"backbone/blocks/{kernel}/kernel"][SAFETENSORS].removesuffix(".weight")
        name = f"base_model.model.{name}.lora_{letter.upper()}.weight"
        for layer, matrix in zip(numbers, stacked, strict=True):
            tensors[name.format(layer=layer)] = np.ascontiguousarray(matrix.T, np.float32)  # files hold [out, in]
    with whole_file(folder / TENSORS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    names = sorted({kernel.split("/")[1] for kernel in kernels})
    config = adapter_config(base, rank, names, None if adapted == layers else list(numbers))
    with whole_file(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
