"""The settings of New-LLM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from newllm_jax.config.base import EVERYWHERE, RunConfig, Schedule, check, setting
from newllm_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class NewLLMConfig(RunConfig):
    """New-LLM; the defaults are those of the published baseline."""

    system: ClassVar[str] = "new-llm"
    configurations: ClassVar[str] = "newllm"
    resumable: ClassVar[frozenset[str]] = frozenset({"num_epochs", "patience", *EVERYWHERE})

    dataset: str = setting("Salesforce/wikitext", "data set: Hub name, local folder or file, or builtin")
    minimum_gain: float = setting(0.001, "least fall of the validation loss that counts as a gain (nats)")

    vocabulary_size: int = setting(1000, "size of the vocabulary: four special tokens and the most frequent words")
    sequence_length: int = setting(64, "ids in a training sequence; the model reads all but the last")
    stride: int = setting(32, "ids between the starts of two windows of a long text")
    minimum_words: int = setting(5, "least number of words in a text; shorter ones are skipped")

    embed_dim: int = setting(256, "size of a word's embedding")
    hidden_dim: int = setting(512, "size of the feed-forward layers")
    context_dim: int = setting(256, "size of the context vector")
    num_layers: int = setting(6, "number of feed-forward layers")
    dropout: float = setting(0.1, "dropout rate after every ReLU, in training")

    schedule: Schedule = setting("constant", "learning rate after the warm-up: constant, or cosine decay to 0")
    warmup_steps: int = setting(0, "updates of linear warm-up of the learning rate")
    decay_epochs: int | None = setting(None, "epochs of the cosine decay; none: num_epochs, never extended")
    clip_norms: tuple[float, ...] = setting((0.5, 1.0, 2.0), "clipping bounds of the gradient norm, one after another")
    clip_epochs: tuple[int, ...] = setting((10, 30), "epochs (from 0) at which the next clipping bound begins")

    def check_resumption(self, stored: Any, run: str) -> None:
        super().check_resumption(stored, run)
        if self.num_epochs != stored.num_epochs and stored.schedule == "cosine" and stored.decay_epochs is None:
            raise InputError(
                f"num_epochs: the learning rate of {run} decays over its {stored.num_epochs} epochs, so it cannot "
                f"become {self.num_epochs}; a new run with decay_epochs set could be extended"
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        check("vocabulary_size", self.vocabulary_size, "5 to 65536 (four special tokens and a word)",
              5 <= self.vocabulary_size <= 65536)  # fmt: skip
        check("sequence_length", self.sequence_length, "at least 3", self.sequence_length >= 3)
        check("stride", self.stride, f"1 to sequence_length ({self.sequence_length})",
              1 <= self.stride <= self.sequence_length)  # fmt: skip
        for name in ("minimum_words", "embed_dim", "hidden_dim", "context_dim", "num_layers"):
            check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        check("batch_size", self.batch_size, f"below 2^31 / hidden_dim ({self.hidden_dim}), to number activations",
              self.batch_size * self.hidden_dim < 2**31)  # fmt: skip
        check("dropout", self.dropout, "0 or more and below 1", 0 <= self.dropout < 1)
        check("warmup_steps", self.warmup_steps, "0 or more", self.warmup_steps >= 0)
        check("decay_epochs", self.decay_epochs, "at least 1", self.decay_epochs is None or self.decay_epochs >= 1)
        check("clip_norms", self.clip_norms, "one or more numbers above 0",
              len(self.clip_norms) > 0 and all(0 < norm < math.inf for norm in self.clip_norms))  # fmt: skip
        check("clip_epochs", self.clip_epochs, f"{len(self.clip_norms) - 1} rising epochs, one fewer than clip_norms",
              len(self.clip_epochs) == len(self.clip_norms) - 1
              and all(a < b for a, b in zip((0, *self.clip_epochs), self.clip_epochs, strict=False)))  # fmt: skip
