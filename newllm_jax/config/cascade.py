"""The settings of CASCADE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from newllm_jax.config.base import check, setting
from newllm_jax.config.chunks import ChunkConfig

Criterion = Literal["cosine", "entropy", "max_probability"]
StageWeights = Literal["last", "best"]


@dataclass(frozen=True, kw_only=True)
class CascadeConfig(ChunkConfig):
    """CASCADE; the defaults are those of the published run at a hard ratio of 0.6. An example is one token."""

    system: ClassVar[str] = "cascade"
    configurations: ClassVar[str] = "cascade"

    num_epochs: int = setting(10, "epochs a stage, early stopping aside")
    batch_size: int = setting(32, "tokens an update")
    patience: int = setting(1, "epochs without a gain that stop a stage early")

    hard_ratio: float = setting(0.6, "share of the tokens that each stage takes over")
    criterion: Criterion = setting("cosine", "what tells hard tokens")
    num_stages: int = setting(5, "stages, each on the hard tokens of the one before")
    stage_layers: int = setting(8, "layers of a stage")
    stage_weights: StageWeights = setting("last", "which weights of a stage go on: last as published, or best")

    def __post_init__(self) -> None:
        super().__post_init__()
        check("hard_ratio", self.hard_ratio, "between 0 and 1, both excluded", 0 < self.hard_ratio < 1)
        for name in ("num_stages", "stage_layers"):
            check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
