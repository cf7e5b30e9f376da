"""A random Llama of four layers, and designs on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade.stage.designs import build_design
from newllm_jax.config import CascadeConfig
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2

LLAMA = LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4
)
REENTRY = {"num_stages": 1, "entry_layer": 1, "context": "sequence", "start": "base", "weights": "lora", "rank": 2,
           "head": "base", "trained_on": "all", "criterion": "probe"}  # fmt: skip
SKIP = {"num_stages": 1, "skipped_layers": (1, 3), "weights": "lora", "rank": 2, "criterion": "probe"}


@dataclass(frozen=True)
class Small:
    """A base with parameters large enough that layers matter, and ids `[3, 12]`."""

    base: SmolLM2
    params: Any
    ids: np.ndarray

    def design(self, **settings):
        return build_design(CascadeConfig(**settings), self.base, "fp32")

    def init(self, design, moved: float = 0.0):
        """The trained parameters at the start; all of them `moved` by random numbers of this size."""
        trained = design.init(self.params, 0, jnp.eye(16))
        leaves, tree = jax.tree.flatten(trained)
        keys = jax.random.split(jax.random.key(7), len(leaves))
        return tree.unflatten(
            leaf + moved * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)
        )


@pytest.fixture(scope="session")
def llama() -> Small:
    base = SmolLM2(LLAMA)
    params = jax.tree.map(lambda leaf: leaf * 8, base.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"])
    return Small(base, params, np.random.default_rng(0).integers(0, 61, (3, 12)).astype(np.int32))
