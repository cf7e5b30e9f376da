"""The settings of CASCADE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from newllm_jax.config.base import BATCH, EPOCHS, EVERYWHERE, SAMPLE, setting
from newllm_jax.config.checking import check
from newllm_jax.config.chunks import ChunkConfig

Criterion = Literal["cosine", "entropy", "max_probability", "margin", "probe"]
StageWeights = Literal["last", "best"]
Context = Literal["token", "sequence"]
Start = Literal["random", "base"]
Weights = Literal["own", "lora"]
Head = Literal["own", "base"]
TrainedOn = Literal["hard", "all"]
Prediction = Literal["replaces", "mixes"]
KeptStages = Literal["all", "best"]

MOST_LAYERS = 1000


@dataclass(frozen=True, kw_only=True)
class CascadeConfig(ChunkConfig):
    """CASCADE; the defaults are those of the published run at a hard ratio of 0.6.

    An example is one token; in a design other than the published one, it is one chunk.
    """

    system: ClassVar[str] = "cascade"
    configurations: ClassVar[str] = "cascade"
    # Not num_epochs or patience: another last epoch of one stage is another input of the next.
    resumable: ClassVar[frozenset[str]] = frozenset({"num_stages", "base_model", *EVERYWHERE})

    num_epochs: int = setting(10, "largest number of epochs of a stage", "training", **EPOCHS)
    batch_size: int = setting(
        32, "examples in an update: tokens, or chunks in a design of your own", "training", **BATCH
    )
    patience: int = setting(1, "epochs without a gain after which a stage stops early", "training", **EPOCHS)
    sample_words: int = setting(
        80, "tokens of the validation text that the report shows with the places where they exit; 0: none", "files",
        **SAMPLE,
    )  # fmt: skip

    hard_ratio: float = setting(
        0.6, "share of its input tokens that each stage is trained on", "stages", above=0, below=1
    )
    flops: float | None = setting(
        None, "mean cost of a token, in passes of the base, that the threshold is set for; none: by hard_ratio",
        "stages", above=0, most=1000,
    )  # fmt: skip
    criterion: Criterion = setting("cosine", "score that tells hard tokens from easy ones", "stages")
    num_stages: int = setting(
        5, "number of stages, each for the hard tokens of the one before", "stages", least=1, most=1000
    )
    stage_layers: int = setting(8, "number of layers in a stage", "stages", least=1, most=MOST_LAYERS)
    stage_weights: StageWeights = setting(
        "last", "stage weights used afterwards: last epoch (as published) or best", "stages"
    )
    kept_stages: KeptStages = setting(
        "all",
        "stages used afterwards: all (as published), or as many as are best on validation, perhaps none",
        "stages",
    )

    entry_layer: int | None = setting(
        None, "layer of the base before which hard tokens enter it again; none: a stage reads the last hidden state",
        "stage design", least=0, most=MOST_LAYERS,
    )  # fmt: skip
    skipped_layers: tuple[int, ...] = setting(
        (),
        "layers of the base that easy tokens skip, the first and one past the last: 14,22",
        "stage design",
        least=0,
        most=MOST_LAYERS,
    )
    skip_rank: int = setting(
        0, "rank of a linear map that stands in for skipped layers; 0: none", "stage design", least=0, most=4096
    )
    short_head: int = setting(
        0, "first ids of the vocabulary that tokens which skip layers get exact scores for; those of the others come "
        "from a product of low rank; 0: the base's head", "stage design", least=0, most=10**7,
    )  # fmt: skip
    short_rank: int = setting(96, "rank of that product", "stage design", least=1, most=4096)
    context: Context = setting(
        "token", "what a stage sees: each token alone (as published) or the sequence", "stage design"
    )
    start: Start = setting(
        "random", "initial layers of a stage: random (as published) or the base's own", "stage design"
    )
    weights: Weights = setting(
        "own", "what is trained: layers of a stage's own, or LoRA adapters on the base's layers", "stage design"
    )
    rank: int = setting(16, "rank of the LoRA adapters", "stage design", least=1, most=4096)
    head: Head = setting(
        "own", "output layer of a stage: its own (as published), or the base's, frozen", "stage design"
    )
    trained_on: TrainedOn = setting(
        "hard", "tokens that a stage is trained on: hard ones (as published) or all", "stage design"
    )
    prediction: Prediction = setting(
        "replaces", "a stage's prediction replaces the base's (as published), or is averaged with it", "stage design"
    )

    @property
    def has_published_design(self) -> bool:
        """Whether stages are built as published: new layers on the last hidden states of single tokens."""
        return all(getattr(self, name) == PUBLISHED[name] for name in PUBLISHED)

    def __post_init__(self) -> None:
        super().__post_init__()
        span = self.skipped_layers
        check("skipped_layers", span, "two rising numbers, or empty",
              not span or (len(span) == 2 and span[0] < span[1]))  # fmt: skip
        without = {"short_head": self.short_head, "skip_rank": self.skip_rank}
        for name, value in without.items():
            check(name, value, "0 without skipped_layers", bool(span) or value == 0)
        if self.has_published_design:
            check("criterion", self.criterion, "a score of a single pass where a stage has the published design; a "
                  "probe needs entry_layer or skipped_layers", self.criterion != "probe")  # fmt: skip
            check("recompute", self.recompute, "false where a stage has the published design, whose tokens are few",
                  not self.recompute)  # fmt: skip
            check("flops", self.flops, "none where a stage has the published design", self.flops is None)
            return
        check("num_stages", self.num_stages, "1 in a design other than the published one, where a second stage gained "
              "nothing", self.num_stages == 1)  # fmt: skip
        if span:
            check("entry_layer", self.entry_layer, "none beside skipped_layers", self.entry_layer is None)
            check("criterion", self.criterion, "probe beside skipped_layers: it is asked before the layers that are "
                  "skipped, where there is no prediction yet", self.criterion == "probe")  # fmt: skip
            check("weights", self.weights, "lora beside skipped_layers", self.weights == "lora")
            for name in ("context", "start", "head", "trained_on", "prediction"):
                check(name, getattr(self, name), f"{PUBLISHED[name]} (its default) beside skipped_layers",
                      getattr(self, name) == PUBLISHED[name])  # fmt: skip
        elif self.entry_layer is None:
            check("start", self.start, "random where entry_layer is none: no layer of the base reads its last hidden "
                  "state", self.start == "random")  # fmt: skip
        check("weights", self.weights, "own where start is random", bool(span) or self.weights == "own" or
              self.start == "base")  # fmt: skip


PUBLISHED = {
    "entry_layer": None, "skipped_layers": (), "context": "token", "start": "random", "weights": "own", "head": "own",
    "trained_on": "hard", "prediction": "replaces",
}  # fmt: skip
