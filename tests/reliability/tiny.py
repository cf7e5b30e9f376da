"""Sources of tiny runs: a corpus, rows of text, a base model; and the commands that train on them in seconds."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

CHECKOUT = Path(__file__).parents[2]


def write_corpus(file: Path) -> None:
    """250 lines of 4 to 29 words, of 60 different ones."""
    draw = random.Random(0)
    lines = ((f"w{draw.randrange(60)}" for _ in range(draw.randrange(4, 30))) for _ in range(250))
    file.write_text("\n".join(map(" ".join, lines)))


def write_rows(file: Path) -> None:
    """Rows of text that follow a pattern a model can learn, 30 chunks and more."""
    draw = np.random.default_rng(1)
    words = ["alpha", "beta", "gamma", "delta", "1234", "omega"]
    rows = [
        {"instruction": "Count", "input": " ".join(draw.choice(words, 30)), "output": " ".join(draw.choice(words, 40))}
        for _ in range(14)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


TINY_LLAMA = {
    "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 8,
}  # fmt: skip
CUTTABLE_LLAMA = {  # by the kernels for GPUs
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_layers": 2, "num_heads": 2,
    "num_kv_heads": 1, "head_dim": 64,
}  # fmt: skip


def write_base(folder: Path, sizes: Mapping[str, int] = TINY_LLAMA) -> None:
    """A random Llama that reads bytes, as a model folder: 257 ids (or more, unused ones), a chat template.

    `sizes`: fields of `LlamaConfig`.
    """
    import jax
    from tokenizers import pre_tokenizers

    from newllm_jax.smollm.llama_config import LlamaConfig
    from newllm_jax.smollm.model import parameter_shapes
    from newllm_jax.smollm.tokenizer import Tokenizer, byte_level_bpe
    from newllm_jax.smollm.weights import save_model

    config = LlamaConfig(**sizes)
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: (
            1 + 0.1 * draw.standard_normal(shape.shape, np.float32)
            if len(shape.shape) == 1
            else draw.standard_normal(shape.shape, np.float32) * 0.5
        ),
        parameter_shapes(config),
    )
    save_model(folder, config, params)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>"]
    backend = byte_level_bpe(letters, [], [1] * 256 + [3])
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    Tokenizer(backend, {"eos_token": "<|im_end|>"}, template).save(folder)


SMALL: dict[str, Any] = {  # the bound of clipping changes after epochs 1 and 3 and is tight enough to matter
    "vocabulary_size": 64, "sequence_length": 16, "stride": 8, "embed_dim": 8, "hidden_dim": 16, "context_dim": 8,
    "num_layers": 2, "learning_rate": 3e-2, "clip_norms": [0.01, 0.1, 1.0], "clip_epochs": [1, 3], "sample_words": 0,
}  # fmt: skip
CHUNKS: dict[str, Any] = {"train_chunks": 8, "validation_chunks": 5}


def settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of a tiny run of each training command, on sources that `write_sources` wrote into `folder`."""
    texts, rows = {"dataset": str(folder / "corpus.txt")}, {"dataset": str(folder / "rows.jsonl")}
    base = {**rows, **CHUNKS, "base_model": str(folder / "base")}
    return {
        "train": {**texts, **SMALL, "num_epochs": 3},
        "cascade": {**base, "num_stages": 2, "stage_layers": 1, "num_epochs": 3, "batch_size": 64,
                    "learning_rate": 0.1, "patience": 5},
        "finetune": {**base, "batch_size": 4, "num_epochs": 3, "learning_rate": 0.3, "sample_words": 0},
    }  # fmt: skip


def write_sources(folder: Path) -> None:
    """Everything that the settings name."""
    write_corpus(folder / "corpus.txt")
    write_rows(folder / "rows.jsonl")
    write_base(folder / "base")


def options(values: dict[str, Any]) -> list[str]:
    """Settings as they are typed."""
    typed = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
    return [f"--{name}={value}" for name, value in typed.items()]


def environment(folder: Path) -> dict[str, str]:
    """The environment of a command whose caches are all in `folder`."""
    return {
        **os.environ,
        "NEWLLM_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(CHECKOUT),
    }


def python(*arguments: object) -> list[str]:
    """A command of this Python."""
    return [sys.executable, *map(str, arguments)]


NEWLLM = python("-m", "newllm_jax")
