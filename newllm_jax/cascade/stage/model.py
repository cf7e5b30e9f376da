"""A stage: a newly initialised Llama that reads the last hidden state of the base or of the stage before it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from newllm_jax.cascade.stage.single_token import run_blocks
from newllm_jax.config import Precision, check
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2, parameter_shapes, rms_norm
from newllm_jax.training.arrays import check_array
from newllm_jax.training.step import Params, count_parameters


class Stage(nn.Module):
    """Blocks with an embedding of their own that serves as head only, all N(0, 0.02) (report of CASCADE).

    Each token is a text of length 1: attention sees one key, so the query and key projections get no gradient (weight
    decay still shrinks them). The parameters are those of a `SmolLM2` with `config.num_layers` layers.

    Attributes:
      config: the architecture, see `stage_config`.
      precision: of every matrix product.
    """

    config: LlamaConfig
    precision: Precision = "fp32"

    def setup(self) -> None:
        check("config", self.config, "a LlamaConfig", isinstance(self.config, LlamaConfig))
        self.llama = SmolLM2(self.config, self.precision)
        nn.share_scope(self, self.llama)

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`hidden [tokens, H]` -> last hidden states `[tokens, H]` (normed) and logits `[tokens, V]`."""
        check_array("hidden", hidden, "numbers", "tokens", self.config.hidden_size)
        if self.is_initializing():
            last = self.llama.from_hidden(hidden[:, None, :]).last[:, 0, :]
        else:
            params = self.variables["params"]["backbone"]
            residual = cast(jax.Array, run_blocks(self.config, self.precision, params["blocks"], hidden))
            last = rms_norm(residual, params["norm"]["scale"], self.config.rms_norm_eps)
        return last, self.llama.logits(last)


def stage_config(base: LlamaConfig, layers: int) -> LlamaConfig:
    """The architecture of a stage on this base: its sizes, with `layers` layers and a tied head."""
    return replace(base, num_layers=layers, tie_embeddings=True)


def stage_size(config: LlamaConfig) -> int:
    """The number of parameters of a stage, from shapes alone."""
    return count_parameters(parameter_shapes(config))


@partial(jax.jit, static_argnums=0)
def init_stage(stage: Stage, seed: int, number: int) -> Params:
    """The initial parameters of stage `number` (from 1) of a seed: each stage draws its own."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return stage.init(key, jnp.zeros((1, stage.config.hidden_size)))["params"]
