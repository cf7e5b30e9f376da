"""The settings of New-LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from newllm_jax.config.base import EPOCHS, EVERYWHERE, RATE, SOURCE, RunConfig, Schedule, setting
from newllm_jax.config.checking import check
from newllm_jax.errors import InputError

Cell = Literal["plain", "residual"]
Initialization = Literal["normal", "he"]
Text = Literal["windows", "stream", "packed"]

WIDTH = {"least": 1, "most": 2**16}
SHARE = {"least": 0, "below": 1}
LARGEST_VOCABULARY = 2**16  # ids are stored in 16 bits
LAST_UPDATE = 2**31 - 1  # Optax counts in int32
MOST_NORMS = 100


@dataclass(frozen=True, kw_only=True)
class NewLLMConfig(RunConfig):
    """New-LLM; the defaults are those of the published baseline."""

    system: ClassVar[str] = "new-llm"
    configurations: ClassVar[str] = "newllm"
    resumable: ClassVar[frozenset[str]] = frozenset({"num_epochs", "patience", *EVERYWHERE})

    dataset: str = setting(
        "Salesforce/wikitext", "data set: Hub name, local folder or file, or builtin", "data", **SOURCE
    )
    minimum_gain: float = setting(
        0.001, "least fall of the validation loss that counts as a gain (nats)", "training", least=0, most=10**6
    )

    text: Text = setting(
        "windows",
        "texts cut into windows; or one stream whose pieces hand on the context vector; or that stream packed into "
        "sequences without padding, each read by itself",
        "data",
    )
    lower_case: bool = setting(True, "whether words are lower-cased", "data")
    vocabulary_size: int | None = setting(
        1000, "size of the vocabulary: four special tokens and the most frequent words; none: all words", "data",
        least=5, most=LARGEST_VOCABULARY,
    )  # fmt: skip
    sequence_length: int = setting(
        64, "ids in a training sequence; the model reads all but the last", "data", least=3, most=2**20
    )
    stride: int = setting(32, "ids between the starts of two windows of a long text", "data", least=1, most=2**20)
    minimum_words: int = setting(
        5,
        "least number of words in a text that is cut into windows; shorter ones are skipped",
        "data",
        least=1,
        most=10**6,
    )

    embed_dim: int = setting(256, "size of a word's embedding", "model", **WIDTH)
    hidden_dim: int = setting(512, "size of the feed-forward layers", "model", **WIDTH)
    context_dim: int = setting(256, "size of the context vector", "model", **WIDTH)
    num_layers: int = setting(6, "number of feed-forward layers", "model", least=1, most=256)
    cell: Cell = setting(
        "plain", "hidden layers that replace their input (plain) or add to it (residual, RMSNorm)", "model"
    )
    initialization: Initialization = setting(
        "normal", "random weights: of standard deviation 0.02 (normal), or by the size of a layer's input (he)", "model"
    )
    forget_bias: float = setting(0.0, "initial bias of the forget gate", "model", least=-100, most=100)
    tie_embeddings: bool = setting(
        False, "whether the output layer uses the embeddings, after a projection to them", "model"
    )

    dropout: float = setting(0.1, "dropout rate after every ReLU, in training", "regularisation", **SHARE)
    variational_dropout: float = setting(
        0.0, "dropout rate after every ReLU with one mask a text", "regularisation", **SHARE
    )
    input_dropout: float = setting(
        0.0, "dropout rate of the embeddings with one mask a text", "regularisation", **SHARE
    )
    output_dropout: float = setting(
        0.0, "dropout rate of what the output layer reads with one mask a text", "regularisation", **SHARE
    )
    weight_dropout: float = setting(
        0.0, "dropout rate of the cell's weights with one mask an update", "regularisation", **SHARE
    )
    word_dropout: float = setting(
        0.0, "dropout rate of whole words' embeddings with one mask an update", "regularisation", **SHARE
    )
    weight_decay: float = setting(0.0, "weight decay of AdamW; 0: Adam", "regularisation", least=0, most=1000)
    ema_decay: float = setting(
        0.0,
        "decay of a moving average of the parameters, which is evaluated instead of them; 0: none",
        "regularisation",
        **SHARE,
    )

    schedule: Schedule = setting(
        "constant", "learning rate after the warm-up: constant, or cosine decay to 0", "optimisation"
    )
    warmup_steps: int = setting(
        0, "updates of linear warm-up of the learning rate", "optimisation", least=0, most=LAST_UPDATE
    )
    decay_epochs: int | None = setting(
        None, "epochs of the cosine decay; none: num_epochs, never extended", "optimisation", **EPOCHS
    )
    clip_norms: tuple[float, ...] = setting(
        (0.5, 1.0, 2.0), "clipping bounds of the gradient norm, one after another", "optimisation", **RATE
    )
    clip_epochs: tuple[int, ...] = setting(
        (10, 30), "epochs (from 0) at which the next clipping bound begins", "optimisation", **EPOCHS
    )

    def check_resumption(self, stored: Any, run: str) -> None:
        super().check_resumption(stored, run)
        if self.num_epochs != stored.num_epochs and stored.schedule == "cosine" and stored.decay_epochs is None:
            raise InputError(
                f"num_epochs: the learning rate of {run} decays over its {stored.num_epochs} epochs, so it cannot "
                f"become {self.num_epochs}; a new run with decay_epochs set could be extended"
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        check("stride", self.stride, f"at most sequence_length ({self.sequence_length})",
              self.stride <= self.sequence_length or self.text != "windows")  # fmt: skip
        check("micro_batch", self.micro_batch, "none where text is a stream, whose rows are read together",
              self.micro_batch is None or self.text != "stream")  # fmt: skip
        check("examples", self.examples, "auto or device where text is a stream, which is read in order",
              self.examples != "files" or self.text != "stream")  # fmt: skip
        check("batch_size", self.batch_size, f"below 2^31 / hidden_dim ({self.hidden_dim}), to number activations",
              self.batch_size * self.hidden_dim < 2**31)  # fmt: skip
        check("clip_norms", self.clip_norms, f"1 to {MOST_NORMS} numbers", 1 <= len(self.clip_norms) <= MOST_NORMS)
        check("clip_epochs", self.clip_epochs, f"{len(self.clip_norms) - 1} rising epochs, one fewer than clip_norms",
              len(self.clip_epochs) == len(self.clip_norms) - 1
              and all(a < b for a, b in zip((0, *self.clip_epochs), self.clip_epochs, strict=False)))  # fmt: skip
