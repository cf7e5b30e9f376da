"""Files of weights to parameters and back, strictly: every tensor is known, is set once, and none is missing.

Parameters are float32 NumPy arrays in the tree of `smollm.parameter_shapes`; the caller moves them to a device. Nothing
is unpickled and no code that comes with a model is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from newllm_jax.errors import InputError
from newllm_jax.files import read_json, whole_file
from newllm_jax.records.tensor_file import check_header
from newllm_jax.smollm.gguf_file import GGUFFile, StoredTensor
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import parameter_shapes
from newllm_jax.training.memory import FLOAT, gib, host_memory

# Parameter -> its tensor in safetensors and in GGUF; those with a layer number are stacked over layers.
TENSOR_NAMES = {
    "embed/embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "backbone/norm/scale": ("model.norm.weight", "output_norm.weight"),
    "lm_head/kernel": ("lm_head.weight", "output.weight"),
    **{
        f"backbone/blocks/{parameter}": (f"model.layers.{{layer}}.{tensor}.weight", f"blk.{{layer}}.{gguf}.weight")
        for parameter, tensor, gguf in (
            ("attention_norm/scale", "input_layernorm", "attn_norm"),
            ("attention/q_proj/kernel", "self_attn.q_proj", "attn_q"),
            ("attention/k_proj/kernel", "self_attn.k_proj", "attn_k"),
            ("attention/v_proj/kernel", "self_attn.v_proj", "attn_v"),
            ("attention/o_proj/kernel", "self_attn.o_proj", "attn_output"),
            ("mlp_norm/scale", "post_attention_layernorm", "ffn_norm"),
            ("mlp/gate_proj/kernel", "mlp.gate_proj", "ffn_gate"),
            ("mlp/up_proj/kernel", "mlp.up_proj", "ffn_up"),
            ("mlp/down_proj/kernel", "mlp.down_proj", "ffn_down"),
        )
    },
}
SAFETENSORS, GGUF = 0, 1  # which of the two names


def read_config(files: Path | GGUFFile) -> LlamaConfig:
    """The architecture of a model folder or GGUF file. Raises InputError where it is missing or not supported."""
    if isinstance(files, GGUFFile):
        return files.config()
    return LlamaConfig.from_dict(_read_object(files / "config.json"), str(files / "config.json"))


def read_params(files: Path | GGUFFile, config: LlamaConfig) -> dict[str, Any]:
    """The parameters in a model folder (safetensors, one file or an index of shards) or a GGUF file.

    Raises:
      InputError: naming file and tensor: a tensor that is unknown, there twice, missing, of another shape, of a type
        that is not a plain float, not finite; a truncated or corrupt file; a quantisation that cannot be read; a model
        that does not fit into memory.
    """
    if isinstance(files, GGUFFile):
        return assemble(files.path, files.tensors(config), config, GGUF)
    return assemble(files, _safetensors(files), config, SAFETENSORS)


def assemble(path: Path, tensors: Iterable[StoredTensor], config: LlamaConfig, kind: int) -> dict[str, Any]:
    """Named tensors, in any order, as a parameter tree. Raises InputError as `read_params` says."""
    shapes: dict[str, Any] = flatten_dict(parameter_shapes(config), sep="/")
    needed = FLOAT * sum(math.prod(shape.shape) for shape in shapes.values())
    where, free = host_memory()
    if free is not None and needed > free:
        raise InputError(f"{path}: the parameters take {gib(needed)} as float32, {where} has {gib(free)} free")
    params = {parameter: np.empty(shape.shape, np.float32) for parameter, shape in shapes.items()}
    places = {name: (parameter, layer) for parameter, layer, name in _places(shapes, config, kind)}
    head_name = TENSOR_NAMES["lm_head/kernel"][kind]
    head, done = None, dict[str, Path]()
    for file, name, shape, read in tensors:
        tied_head = config.tie_embeddings and name == head_name  # some exporters write it although tied
        if name not in places and not tied_head:
            raise InputError(f"{file}: unknown tensor {name!r} (a Llama of {config.num_layers} layers is expected)")
        if name in done:
            raise InputError(f"{file}: tensor {name} is there twice (also in {done[name].name})")
        done[name] = file
        parameter, layer = ("embed/embedding", None) if tied_head else places[name]
        place = params[parameter] if layer is None else params[parameter][layer]
        place = place.T if parameter.endswith("kernel") else place  # files hold [out, in]
        if shape != place.shape:
            raise InputError(f"{file}: tensor {name} has shape {list(shape)}, expected {list(place.shape)}")
        values = read()
        if not np.isfinite(values).all():
            raise InputError(f"{file}: tensor {name} has values that are not finite")
        if tied_head:
            head = file, values
        else:
            place[...] = values
    missing = [name for name in places if name not in done]
    if missing:
        raise InputError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if head is not None and not np.array_equal(head[1], params["embed/embedding"]):
        raise InputError(f"{head[0]}: {head_name} differs from the embedding, to which the configuration ties it")
    return unflatten_dict(params, sep="/")


def save_model(folder: Path, config: LlamaConfig, params: Mapping[str, Any]) -> None:
    """Writes `config.json` and `model.safetensors` (float32), which transformers loads as a `LlamaForCausalLM`."""
    from safetensors.numpy import save_file

    flat: dict[str, Any] = flatten_dict(jax.device_get(dict(params)), sep="/")
    tensors = {}
    for parameter, layer, name in _places(flat, config, SAFETENSORS):
        values = np.asarray(flat[parameter] if layer is None else flat[parameter][layer], np.float32)
        tensors[name] = np.ascontiguousarray(values.T if parameter.endswith("kernel") else values)
    with whole_file(folder / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})  # transformers asks for a format it knows
    with whole_file(folder / "config.json") as partial:
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def _places(parameters: Iterable[str], config: LlamaConfig, kind: int) -> Iterator[tuple[str, int | None, str]]:
    """Each parameter with its tensor's name; a stacked one once per layer, with the layer's number."""
    for parameter in parameters:
        name = TENSOR_NAMES[parameter][kind]
        if "{layer}" not in name:
            yield parameter, None, name
            continue
        for layer in range(config.num_layers):
            yield parameter, layer, name.format(layer=layer)


def _safetensors(folder: Path) -> Iterator[StoredTensor]:
    index_file = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        yield from _shard(folder / "model.safetensors")
    elif index_file.exists():
        yield from _shards(index_file)
    else:
        raise InputError(f"{folder}: no model.safetensors (nor an index of shards); pickled weights are never read")


def _shards(index_file: Path) -> Iterator[StoredTensor]:
    index = _read_object(index_file).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise InputError(f"{index_file}: no weight_map of tensors to files")
    seen = set()
    for name in sorted(set(index.values())):
        if Path(name).name != name:
            raise InputError(f"{index_file}: shard {name!r} is not a file name")
        for tensor in _shard(index_file.parent / name):
            if tensor.name not in index:
                raise InputError(f"{tensor.file}: unknown tensor {tensor.name!r} ({index_file.name} does not list it)")
            seen.add((tensor.name, name))
            yield tensor
    for tensor, name in index.items():
        if (tensor, name) not in seen:
            raise InputError(f"{index_file.parent / name}: tensor {tensor!r} is missing (the index says it is there)")


def _shard(file: Path) -> Iterator[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    check_header(file)
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                kind, shape = part.get_dtype(), tuple(part.get_shape())
                if kind not in {"F32", "BF16", "F16"}:
                    raise InputError(f"{file}: tensor {name!r} is of type {kind}; F32, BF16 and F16 can be read")
                yield StoredTensor(file, name, shape, lambda name=name: opened.get_tensor(name).astype(np.float32))
    except SafetensorError as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error})") from error


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a JSON object")
    return content
