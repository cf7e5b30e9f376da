"""A pretrained SmolLM2, ready to call: source, configuration, parameters and tokenizer in one step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_jax.config.base import SOURCE
from newllm_jax.config.checking import checked
from newllm_jax.errors import InputError
from newllm_jax.smollm.gguf_file import GGUFFile
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.smollm.tokenizer import Tokenizer, read_tokenizer
from newllm_jax.smollm.weights import read_config, read_params
from newllm_jax.sources.weights import DEFAULT_BASE, PACKAGE, WeightSource, open_weights


@dataclass(frozen=True)
class Pretrained:
    """A frozen model and all that is needed to use it.

    Attributes:
      model: `model.apply({"params": params}, ids)` gives logits; in strict float32.
      params: float32 NumPy arrays; `jax.device_put` moves them.
      tokenizer: text to ids and back.
      source: where the weights came from.
    """

    model: SmolLM2
    params: dict[str, Any]
    tokenizer: Tokenizer
    source: WeightSource


def load_smollm2(base_model: str = DEFAULT_BASE, fallback: str = PACKAGE) -> Pretrained:
    """Loads SmolLM2 or a Llama of its family; arguments and errors of `open_weights`, errors of `read_params`.

    >>> import jax.numpy as jnp
    >>> base = load_smollm2("base")  # a model folder; without an argument SmolLM2-135M-Instruct from the Hub
    >>> ids = jnp.array([base.tokenizer.encode("Hello")])
    >>> logits, _ = base.model.apply({"params": base.params}, ids)
    >>> logits.shape == (1, ids.size, base.model.config.vocab_size)
    True
    """
    checked("base_model", base_model, str, **SOURCE)
    checked("fallback", fallback, str)
    return _load(open_weights(base_model, fallback))


def load_folder(folder: Path, base_model: str, fingerprint: str) -> Pretrained:
    """The model in a folder, which was made of another one. Errors of `read_params`.

    Args:
      base_model, fingerprint: of the model that it was made of.
    """
    return _load(WeightSource(base_model, str(folder), folder, "", fingerprint))


def _load(source: WeightSource) -> Pretrained:
    files = open_files(source.path)
    config, tokenizer = read_description(files)
    return Pretrained(SmolLM2(config), read_params(files, config), tokenizer, source)


def open_files(path: Path) -> Path | GGUFFile:
    """A model folder as it is, a `.gguf` file opened (once: it takes seconds)."""
    return GGUFFile(path) if path.suffix == ".gguf" else path


def read_description(files: Path | GGUFFile) -> tuple[LlamaConfig, Tokenizer]:
    """Configuration and tokenizer, without any tensor. Raises InputError where they do not belong together."""
    config, tokenizer = read_config(files), read_tokenizer(files)
    if tokenizer.vocab_size > config.vocab_size:
        name = files.path if isinstance(files, GGUFFile) else files
        raise InputError(f"{name}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    return config, tokenizer
