"""GGUF files of Llamas: metadata, architecture and dequantised tensors. Reading them needs the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from newllm_jax.errors import InputError
from newllm_jax.smollm.gguf_header import check_header
from newllm_jax.smollm.llama_config import LlamaConfig


class StoredTensor(NamedTuple):
    """A tensor in a file of weights.

    Attributes:
      read: its values, float32 and of this shape.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class GGUFFile:
    """An opened GGUF file. Opening reads the header, which takes seconds for a large vocabulary; tensors are mapped."""

    def __init__(self, path: Path) -> None:
        """Raises InputError: no such file, not GGUF, corrupt or truncated, or the `gguf` package is not installed."""
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise InputError(
                f"{path}: to read GGUF, install the gguf package: pip install 'newllm-jax[gguf]'"
            ) from error
        self.path = path
        check_header(path)
        try:
            self._reader = GGUFReader(path)
        except (ValueError, KeyError) as error:  # names that are no UTF-8 or there twice, types that do not fit
            raise InputError(f"{path}: truncated or corrupt ({error})") from error

    def metadata(self, key: str, kind: type = object, default: Any = None) -> Any:
        """A metadata value as a Python value of a type.

        Raises:
          InputError: it is of another type, or absent and there is no default.
        """
        field = self._reader.get_field(key)
        if field is None and default is None:
            raise InputError(f"{self.path}: metadata {key} is missing")
        try:
            value = default if field is None else field.contents()
        except ValueError as error:  # a text that is no UTF-8
            raise InputError(f"{self.path}: metadata {key} is corrupt ({error})") from error
        if not isinstance(value, kind):
            raise InputError(f"{self.path}: metadata {key} is not of type {kind.__name__}")
        return value

    def config(self) -> LlamaConfig:
        """The architecture. Raises InputError where it is not a plain Llama."""
        architecture = self.metadata("general.architecture")
        if architecture != "llama":
            raise InputError(f"{self.path}: architecture {architecture!r} is not supported, only llama is")

        def llama(key: str, default: Any = None, kind: type = object) -> Any:
            return self.metadata(f"llama.{key}", kind, default)

        scaling = llama("rope.scaling.type", "none")
        if scaling != "none":
            raise InputError(f"{self.path}: rotary scaling {scaling!r} is not supported")
        heads = llama("attention.head_count")
        epsilon = np.float32(llama("attention.layer_norm_rms_epsilon", kind=float))
        config = LlamaConfig.from_dict(
            {
                "model_type": "llama",
                "vocab_size": len(self.metadata("tokenizer.ggml.tokens", list)),
                "hidden_size": llama("embedding_length"),
                "intermediate_size": llama("feed_forward_length"),
                "num_hidden_layers": llama("block_count"),
                "num_attention_heads": heads,
                "num_key_value_heads": llama("attention.head_count_kv", heads),
                "head_dim": llama("attention.key_length", 0) or None,
                "max_position_embeddings": llama("context_length"),
                "rope_theta": llama("rope.freq_base", 10000.0),
                "rms_norm_eps": float(str(epsilon)),  # 1e-05 as it was written, not 9.999999747378752e-06
                "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in self._reader.tensors),
            },
            str(self.path),
        )
        if llama("rope.dimension_count", config.head_dim) != config.head_dim:
            raise InputError(f"{self.path}: rotary positions on a part of each head are not supported")
        return config

    def tensors(self, config: LlamaConfig) -> Iterator[StoredTensor]:
        """Each tensor, query and key rows in the order of the Hugging Face layout.

        Raises:
          InputError: when one is read whose quantisation the `gguf` package cannot undo.
        """
        heads = {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}
        for tensor in self._reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            rotated = heads.get(tensor.name.split(".", 2)[-1], 0)  # blk.N.attn_q.weight
            yield StoredTensor(self.path, tensor.name, shape, partial(self._values, tensor, rotated))

    def _values(self, tensor: Any, heads: int) -> np.ndarray:
        from gguf.quants import dequantize

        try:
            with np.errstate(all="ignore"):  # scales that are not finite give values that are not, see `assemble`
                values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except (NotImplementedError, ValueError, IndexError) as error:
            kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
            raise InputError(
                f"{self.path}: tensor {tensor.name!r}: quantisation {kind} cannot be read ({error})"
            ) from error
        return halves_apart(values, heads) if heads else values


def halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's order of a head's rows, in which the two rows of a rotary plane stand side by side.

    GGUF has rows 0, d/2, 1, d/2 + 1, ... of each head of d rows; Llama rotates row i with row i + d/2.
    """
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
