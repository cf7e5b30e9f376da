"""What the long tests run: small settings of every command, and a random Llama in a folder; no network."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
START = dict(os.environ)  # before a long test sets something for its own process


def environment(**more: str) -> dict[str, str]:
    """Of a process that uses this checkout, and neither reads nor writes programs that others compiled."""
    path = os.pathsep.join(filter(None, [str(ROOT), START.get("PYTHONPATH")]))
    return {**START, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "JAX_ENABLE_COMPILATION_CACHE": "false", **more}


def small_newllm(folder: Path) -> list[str]:
    """Options of a New-LLM whose epoch takes milliseconds."""
    draw, file = random.Random(0), folder / "texts.txt"
    lines = (" ".join(f"w{draw.randrange(60)}" for _ in range(draw.randrange(5, 30))) for _ in range(60))
    file.write_text("\n".join(lines))
    settings = {
        "config": "quickstart", "dataset": file, "vocabulary_size": 64, "sequence_length": 16, "stride": 16,
        "embed_dim": 8, "hidden_dim": 16, "context_dim": 8, "num_layers": 2,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


def random_llama(folder: Path, seed: int = 0) -> Path:
    """A model folder: a Llama of random weights that reads bytes. Its sizes are those that the GPU kernels can cut."""
    import jax
    from tokenizers import pre_tokenizers

    from newllm_jax.smollm.llama_config import LlamaConfig
    from newllm_jax.smollm.model import parameter_shapes
    from newllm_jax.smollm.tokenizer import Tokenizer, byte_level_bpe
    from newllm_jax.smollm.weights import save_model

    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=192, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64
    )
    draw = np.random.default_rng(seed)

    def random_array(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        values = draw.standard_normal(shape.shape, np.float32)
        return 1 + 0.1 * values if values.ndim == 1 else 0.1 * values

    folder.mkdir(parents=True)
    save_model(folder, config, jax.tree.map(random_array, parameter_shapes(config)))
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>"]
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    byte_reader = byte_level_bpe(letters, [], [1] * 256 + [3])
    Tokenizer(byte_reader, {"eos_token": "<|im_end|>"}, template).save(folder)
    return folder
