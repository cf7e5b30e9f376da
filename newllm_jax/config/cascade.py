"""The settings of CASCADE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from newllm_jax.config.base import BATCH, EPOCHS, EVERYWHERE, setting
from newllm_jax.config.chunks import ChunkConfig

Criterion = Literal["cosine", "entropy", "max_probability"]
StageWeights = Literal["last", "best"]


@dataclass(frozen=True, kw_only=True)
class CascadeConfig(ChunkConfig):
    """CASCADE; the defaults are those of the published run at a hard ratio of 0.6. An example is one token."""

    system: ClassVar[str] = "cascade"
    configurations: ClassVar[str] = "cascade"
    # Not num_epochs or patience: another last epoch of one stage is another input of the next.
    resumable: ClassVar[frozenset[str]] = frozenset({"num_stages", "base_model", *EVERYWHERE})

    num_epochs: int = setting(10, "largest number of epochs of a stage", **EPOCHS)
    batch_size: int = setting(32, "tokens in an update", **BATCH)
    patience: int = setting(1, "epochs without a gain after which a stage stops early", **EPOCHS)

    hard_ratio: float = setting(0.6, "share of its input tokens that each stage is trained on", above=0, below=1)
    criterion: Criterion = setting("cosine", "score that tells hard tokens from easy ones")
    num_stages: int = setting(5, "number of stages, each for the hard tokens of the one before", least=1, most=1000)
    stage_layers: int = setting(8, "number of layers in a stage", least=1, most=1000)
    stage_weights: StageWeights = setting("last", "stage weights used afterwards: last epoch (as published) or best")
