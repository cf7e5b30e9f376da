"""A random Llama of four layers, and designs on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade.experiment import train_cascade
from newllm_jax.cascade.plan import plan_cascade
from newllm_jax.cascade.stage.designs import build_design
from newllm_jax.config import CascadeConfig
from newllm_jax.records.results import RunResult
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


@pytest.fixture(scope="session")
def split_in_four(tiny_base, tiny_rows) -> dict[str, Any]:
    """The settings of tiny runs with chunks to calibrate and to test on, whose tokens are of four splits of rows."""
    return {
        "base_model": tiny_base, "dataset": tiny_rows, "train_chunks": 9, "validation_chunks": 6,
        "calibration_chunks": 6, "test_chunks": 6, "whole_rows": True, "num_stages": 1, "batch_size": 4,
        "num_epochs": 2, "patience": 2,
    }  # fmt: skip


@pytest.fixture(scope="session")
def reentry_config(split_in_four) -> CascadeConfig:
    """A re-entry of the last of two layers, by entropy, that helps."""
    settings = {"entry_layer": 1, "criterion": "entropy", "trained_on": "hard", "hard_ratio": 0.4}
    return CascadeConfig(**{**split_in_four, **REENTRY, **settings, "learning_rate": 0.02})


@pytest.fixture(scope="session")
def skip_config(split_in_four) -> CascadeConfig:
    """The last layer skipped, with a short head, at a mean cost; with a learning rate that harms, so none is kept."""
    settings = {"skipped_layers": (1, 2), "skip_rank": 2, "short_head": 100, "short_rank": 4, "flops": 0.9}
    return CascadeConfig(**{**split_in_four, **SKIP, **settings, "learning_rate": 5.0, "kept_stages": "best"})


@pytest.fixture(scope="session")
def reentry_plan(reentry_config) -> dict[str, Any]:
    """What the run would be, before it is."""
    return plan_cascade(reentry_config)


@pytest.fixture(scope="session")
def reentry_run(reentry_config, reentry_plan, tmp_path_factory) -> RunResult:
    """A finished run. Tests that change it take a copy."""
    return train_cascade(reentry_config, name="reentry", run_root=tmp_path_factory.mktemp("reentry"), narrate=str)


@pytest.fixture(scope="session")
def skip_run(skip_config, tmp_path_factory) -> RunResult:
    """A finished run. Tests that change it take a copy."""
    return train_cascade(skip_config, name="skip", run_root=tmp_path_factory.mktemp("skip"), narrate=str)
