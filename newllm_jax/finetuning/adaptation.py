"""What of a base is trained: all parameters, its last layers, or LoRA adapters; and which layers it lacks from then on.

Freezing is structural. The parameters of the model are divided into a tree that is trained and one that is frozen, an
argument of the compiled update; only the first is in the train state, the optimiser and the checkpoints:

    trained           trained tree                                frozen tree
    all parameters    the model's parameters                      nothing
    last layers       their blocks and the final norm             everything else
    adapters          `lora.init_adapters` of the last layers     the model's parameters

Blocks below the first layer that is changed are frozen apart, as `below`: no gradient is computed there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.config import FinetuneConfig, Precision, check
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.lora import init_adapters, merge_adapters
from newllm_jax.smollm.model import SmolLM2, parameter_shapes
from newllm_jax.training.step import Params, count_parameters


@dataclass(frozen=True)
class Adaptation:
    """How a base becomes the model that is trained.

    Attributes:
      llama: the architecture of that model: the base's, without the layers that are left out.
      dropped: the first layer of the base that is left out, and the first after those; () where none is.
      first: the first layer of the model that training changes.
      is_partial: whether only layers from `first` on, and the final norm, are trained.
      rank: of the adapters; 0: none.
      recompute: of the model, see `SmolLM2`.
    """

    llama: LlamaConfig
    dropped: tuple[int, ...]
    first: int
    is_partial: bool
    rank: int
    recompute: bool = False

    @property
    def upper(self) -> LlamaConfig:
        """The model from `first` on."""
        return replace(self.llama, num_layers=self.llama.num_layers - self.first)

    def prune(self, params: Params) -> Params:
        """The parameters of a base without the layers that are left out."""
        if not self.dropped:
            return params
        start, stop = self.dropped
        blocks = jax.tree.map(
            lambda stacked: jnp.concatenate([stacked[:start], stacked[stop:]]), params["backbone"]["blocks"]
        )
        return {**params, "backbone": {**params["backbone"], "blocks": blocks}}

    def freeze(self, params: Params) -> Params:
        """The frozen tree of the model's parameters."""
        if not (self.rank or self.is_partial):
            return {}
        backbone = {"below": _layers(params, slice(self.first))}
        if self.rank:
            backbone |= self._changed(params)
        return jax.tree.map(jnp.asarray, {**params, "backbone": backbone})

    def start(self, params: Params, seed: int) -> Params:
        """The trained tree before the first update, a copy. `seed`: of the adapters."""
        if self.rank:
            return init_adapters(self.upper, self.rank, jax.random.key(seed))
        return jax.tree.map(jnp.array, {"backbone": self._changed(params)} if self.is_partial else params)

    def _changed(self, params: Params) -> Params:
        """The blocks from `first` on, and the final norm."""
        return {"blocks": _layers(params, slice(self.first, None)), "norm": params["backbone"]["norm"]}

    def upper_params(self, frozen: Params, trained: Params) -> Params:
        """The parameters of the model from `first` on, with its embedding, final norm and head."""
        if self.rank:
            return merge_adapters(frozen, trained)
        return {**frozen, **trained}

    def merge(self, frozen: Params, trained: Params) -> Params:
        """The parameters of the whole model, those of `SmolLM2(self.llama)`."""
        params = self.upper_params(frozen, trained)
        if not frozen:
            return params
        backbone = params["backbone"]
        blocks = jax.tree.map(
            lambda lower, upper: jnp.concatenate([lower, upper]), frozen["backbone"]["below"], backbone["blocks"]
        )
        return {**params, "backbone": {"blocks": blocks, "norm": backbone["norm"]}}

    def logits(self, precision: Precision, frozen: Params, trained: Params, ids: jax.Array) -> jax.Array:
        """`ids [B, T]` -> logits `[B, T, V]`. Nothing that the layers before `first` compute has a gradient."""
        params: Any = {"params": self.upper_params(frozen, trained)}
        upper = SmolLM2(self.upper, precision, recompute=self.recompute)
        if not self.first:
            logits, _ = upper.apply(params, ids)  # type: ignore[misc]
            return logits
        lower = SmolLM2(replace(self.llama, num_layers=self.first), precision)
        backbone = {"blocks": frozen["backbone"]["below"], "norm": params["params"]["backbone"]["norm"]}
        below: Any = lower.apply({"params": {**frozen, "backbone": backbone}}, ids, method="hidden")
        states: Any = upper.apply(params, below.residual, method="from_hidden")
        logits: Any = upper.apply(params, states.last, method="logits")
        return logits

    def shapes(self) -> tuple[Params, Params]:
        """The frozen tree and the trained one as shapes and types."""
        return jax.eval_shape(lambda params: (self.freeze(params), self.start(params, 0)), parameter_shapes(self.llama))

    def sizes(self) -> tuple[int, int]:
        """How many parameters are frozen, and how many trained."""
        frozen, trained = map(count_parameters, self.shapes())
        return frozen, trained

    def results(self) -> dict[str, int]:
        """Of the model, for `results.json`: its layers and parameters, and how many parameters are trained."""
        parameters, (_, trained) = count_parameters(parameter_shapes(self.llama)), self.sizes()
        return {"layers": self.llama.num_layers, "parameters": parameters, "trained_parameters": trained}


def choose_adaptation(config: FinetuneConfig, base: LlamaConfig) -> Adaptation:
    """What the settings make of a base. Raises InputError where it has not the layers that they name."""
    dropped, layers = config.dropped_layers, base.num_layers
    if dropped:
        stop = dropped[1]
        check("dropped_layers", dropped, f"within the {layers} layers of the base", stop <= layers)
        layers -= stop - dropped[0]
        check("dropped_layers", dropped, f"fewer than the {base.num_layers} layers of the base", layers > 0)
    trained = layers if config.trained_layers is None else config.trained_layers
    check("trained_layers", trained, f"at most {layers}, the layers of the model, or none", trained <= layers)
    return Adaptation(
        llama=replace(base, num_layers=layers),
        dropped=dropped,
        first=layers - trained,
        is_partial=config.trained_layers is not None,
        rank=config.rank if config.adapter == "lora" else 0,
        recompute=config.recompute,
    )


def _layers(params: Params, which: slice) -> Params:
    return jax.tree.map(lambda stacked: stacked[which], params["backbone"]["blocks"])
