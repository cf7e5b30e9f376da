"""The settings of the peers, of which a search tries many. Importing this module needs no PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from newllm_jax.config import check_fields, setting
from newllm_jax.config.checking import check
from newllm_jax.config.parsing import type_of

Kind = Literal["lstm", "gpt"]
SHARE: dict[str, Any] = {"least": 0, "below": 1}
WIDTH: dict[str, Any] = {"least": 1, "most": 2**16}
KINDS: dict[str, str] = {"lstm": "LSTM", "gpt": "GPT"}
ONLY_LSTM = ("word_dropout", "between_dropout", "output_dropout", "weight_dropout")
ONLY_GPT = ("residual_dropout", "attention_dropout")


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """A peer and its training.

    The dropouts of an LSTM are those of AWD-LSTM (Merity et al. 2018): one mask a sequence for activations, one an
    update for weights and words.

    Raises:
      InputError: a wrong type, a value out of range, or a setting that this kind does not have.
    """

    kind: Kind = "lstm"
    layers: int = setting(2, least=1, most=256)
    hidden: int = setting(512, **WIDTH)  # of an LSTM's layers, but the last where embeddings are tied; a GPT's width
    embed: int = setting(256, **WIDTH)  # a word's embedding; of a GPT: as `hidden`
    heads: int | None = setting(None, **WIDTH)  # of a GPT
    tie: bool = setting(False)  # whether the output layer uses the embeddings

    word_dropout: float = setting(0.0, **SHARE)  # whole words' embeddings
    input_dropout: float = setting(0.0, **SHARE)  # embeddings; of a GPT: of word and position, a mask of its own each
    between_dropout: float = setting(0.0, **SHARE)  # outputs of all layers but the last
    output_dropout: float = setting(0.0, **SHARE)  # outputs of the last layer
    weight_dropout: float = setting(0.0, **SHARE)  # hidden-to-hidden matrices (DropConnect)
    residual_dropout: float = setting(0.0, **SHARE)  # what a GPT's layers add to their input
    attention_dropout: float = setting(0.0, **SHARE)  # weights of the attention

    learning_rate: float = setting(1e-3, above=0, most=1e3)  # at its peak; then a cosine to 0
    weight_decay: float = setting(0.0, least=0, most=1e3)  # of AdamW, for matrices
    ema_decay: float = setting(0.0, **SHARE)  # of the moving average that is evaluated; 0: none
    warmup_steps: int = setting(100, least=0, most=10**6)
    clip: float = setting(1.0, above=0, most=1e30)  # bound of the gradients' global norm
    epochs: int = setting(20, least=1, most=10_000)
    batch_size: int = setting(128, least=1, most=2**16)  # of a stream: the rows that are read side by side
    seed: int = setting(0, least=0, most=2**31 - 1)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind == "gpt":
            check("embed", self.embed, f"hidden ({self.hidden}) in a gpt", self.embed == self.hidden)
            check("heads", self.heads, f"a divisor of hidden ({self.hidden}) in a gpt",
                  self.heads is not None and self.hidden % self.heads == 0)  # fmt: skip
        else:
            check("heads", self.heads, "none in an lstm", self.heads is None)
        for name in ONLY_LSTM if self.kind == "gpt" else ONLY_GPT:
            check(name, getattr(self, name), f"0 in a peer of kind {self.kind}", getattr(self, name) == 0)

    @property
    def title(self) -> str:
        """A name for tables: kind and shape."""
        tied = ", tied" if self.tie else ""
        return f"{KINDS[self.kind]} {self.layers} x {self.hidden}, embedding {self.embed}{tied}"

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return dataclasses.asdict(self)

    def override(self, settings: Mapping[str, Any]) -> Self:
        """These settings with some replaced. Raises InputError: an unknown name, or a value that is refused."""
        check("settings", settings, "a table of settings by name", isinstance(settings, Mapping))
        for name in settings:
            type_of(type(self), name)
        return dataclasses.replace(self, **settings)
