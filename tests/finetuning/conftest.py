"""A base with layers enough to leave some out, to freeze some and to train the others."""

from __future__ import annotations

import pytest

from newllm_jax.config import FinetuneConfig
from tests.reliability.tiny import TINY_LLAMA, write_base


@pytest.fixture(scope="session")
def deep_base(tmp_path_factory) -> str:
    """The tiny Llama with 4 layers, as a model folder."""
    folder = tmp_path_factory.mktemp("deep")
    write_base(folder, {**TINY_LLAMA, "num_layers": 4})
    return str(folder)


@pytest.fixture(scope="session")
def deep(deep_base, tiny_rows) -> FinetuneConfig:
    """A run of seconds on it."""
    return FinetuneConfig(
        base_model=deep_base, dataset=tiny_rows, train_chunks=9, validation_chunks=3, batch_size=4, num_epochs=3,
        learning_rate=0.03, rank=3, sample_words=0,
    )  # fmt: skip
