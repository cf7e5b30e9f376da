"""A stage: a fresh Llama that reads the last hidden state of what came before, one token at a time."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.typing import PrecisionLike

from newllm_jax.cascade.llama_config import LlamaConfig
from newllm_jax.cascade.single_token import through_blocks
from newllm_jax.cascade.smollm import SmolLM2, rms_norm
from newllm_jax.config import CascadeConfig
from newllm_jax.training.step import LossFn, Params, Sums, UpdateFn, make_updates, train_step


class Stage(nn.Module):
    """Blocks with an embedding of their own that serves as head only, all N(0, 0.02) (report of CASCADE).

    Each token is a text of length 1: attention sees one key, so the query and key projections get no gradient (weight
    decay still shrinks them). The parameters are those of a `SmolLM2` with `config.num_layers` layers.

    Attributes:
      config: the architecture, see `stage_config`.
      precision: of every matrix product.
    """

    config: LlamaConfig
    precision: PrecisionLike = jax.lax.Precision.HIGHEST

    def setup(self) -> None:
        self.llama = SmolLM2(self.config, self.precision)
        nn.share_scope(self, self.llama)

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`hidden [tokens, hidden]` -> last hidden states `[tokens, hidden]` (normed) and logits `[tokens, vocab]`."""
        if self.is_initializing():
            last = self.llama.from_hidden(hidden[:, None, :]).last[:, 0, :]
        else:
            params = self.variables["params"]["backbone"]
            residual = cast(jax.Array, through_blocks(self.config, self.precision, params["blocks"], hidden))
            last = rms_norm(residual, params["norm"]["scale"], self.config.rms_norm_eps)
        return last, self.llama.logits(last)


def stage_config(base: LlamaConfig, layers: int) -> LlamaConfig:
    """The architecture of a stage on this base: its sizes, with `layers` layers and a tied head."""
    return replace(base, num_layers=layers, tie_embeddings=True)


@partial(jax.jit, static_argnums=0)
def init_stage(stage: Stage, seed: int, number: int) -> Params:
    """The initial parameters of stage `number` (from 1) of a seed: each stage draws its own."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return stage.init(key, jnp.zeros((1, stage.config.hidden_size)))["params"]


def next_token_loss(stage: Stage) -> LossFn:
    """The loss of a stage as the update loop wants it; its batch is `(hidden [batch, hidden], targets [batch])`."""

    def loss(params: Params, batch: Any, present: jax.Array, key: jax.Array | None) -> Sums:
        hidden, targets = batch
        _, logits = cast(tuple[jax.Array, jax.Array], stage.apply({"params": params}, hidden))
        return sums_of(logits, targets, present)

    return loss


def stage_updates(
    stage: Stage, config: CascadeConfig, optimizer: optax.GradientTransformation, precision: str
) -> UpdateFn:
    """The compiled updates of a stage in a resolved precision: on GPUs that can, through kernels of their own."""
    if not fusible(stage, config.batch_size, precision):
        return make_updates(partial(train_step, next_token_loss(stage), optimizer))
    from newllm_jax.cascade.fused_step import stage_step

    return make_updates(partial(stage_step, stage, config, optimizer))


def fusible(stage: Stage, batch_size: int, precision: str) -> bool:
    """Whether a stage's updates in this resolved precision can go through the kernels of `fused_step.py`.

    They need what tf32 needs, an NVIDIA GPU of compute capability 8.0; widths that cut into tiles of 64; a batch that
    a thread block can hold, and a power of two; and a JAX that has Pallas's Triton backend.
    """
    config = stage.config
    heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widths = config.vocab_size, config.hidden_size, config.intermediate_size, *heads
    return (
        precision == "tf32" and not any(width % 64 for width in widths) and batch_size in (16, 32, 64)
        and importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    )  # fmt: skip


def sums_of(logits: jax.Array, targets: jax.Array, present: jax.Array) -> Sums:
    """Cross-entropy (nats) and hits of `logits [batch, vocab]`, over the targets that are present."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, -1) == targets) & present
    return Sums(loss=jnp.sum(losses, where=present), hits=jnp.sum(hits), count=jnp.sum(present))
