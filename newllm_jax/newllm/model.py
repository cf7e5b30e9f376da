"""New-LLM: a gated context vector of fixed size, carried from token to token through a deep feed-forward network.

At each position t, with c_0 = 0 (report of New-LLM; LayerNorm: Ba et al. 2016):

    h    = ReLU(W_1 [e_t ; c] + b_1), then num_layers - 1 times h = ReLU(W_l h + b_l)    dropout after every ReLU
    f, i = sigmoid(W_f h + b_f), sigmoid(W_i h + b_i);   d = W_d h + b_d
    c    = clip(LayerNorm(f * c + i * d), -10, 10)
    logits_t = W_o h + b_o

W_1 [e ; c] is computed as W_e e + W_c c, so that the token's part, like the logits, stays outside the time loop.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import normal, ones, zeros

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.recurrence.cell import CellParams, dropout_seeds
from newllm_jax.newllm.recurrence.scan import Loops, scan

WEIGHT_STD = 0.02


class ContextCell(nn.Module):
    """The recurrent part: declares the weights that `recurrence.scan` works with."""

    hidden_dim: int
    num_layers: int
    dropout: float
    precision: jax.lax.PrecisionLike
    loops: Loops

    @nn.compact
    def __call__(self, context: jax.Array, tokens: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        """`context [batch, context]`, `tokens [time, batch, hidden]` -> last context, hidden states like `tokens`."""
        hidden, width = tokens.shape[-1], context.shape[-1]

        def layer(name: str, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
            return (
                self.param(f"{name}_kernel", normal(WEIGHT_STD), (inputs, outputs)),
                self.param(f"{name}_bias", zeros, (outputs,)),
            )

        params = CellParams(
            context_in=self.param("context_in_kernel", normal(WEIGHT_STD), (width, hidden)),
            hidden=tuple(layer(f"hidden_{index}", hidden, hidden) for index in range(2, self.num_layers + 1)),
            gates=layer("gates", hidden, 3 * width),
            norm=(self.param("norm_scale", ones, (width,)), self.param("norm_bias", zeros, (width,))),
        )
        dropped = not deterministic and self.dropout > 0
        seeds = dropout_seeds(self.make_rng("dropout")) if dropped else None
        return scan(params, context, tokens, seeds, self.dropout, self.precision, self.loops)


class ContextVectorLM(nn.Module):
    """The language model: ids and a context vector in, logits and the context vector after the last id out.

    Attributes:
      dropout: the share of activations that training drops after every ReLU.
      precision: of every matrix product.
      loops: the form of its time loops; see `recurrence.loops_for`.
    """

    vocabulary_size: int = 1000
    embed_dim: int = 256
    hidden_dim: int = 512
    context_dim: int = 256
    num_layers: int = 6
    dropout: float = 0.1
    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST
    loops: Loops = "rows"

    @classmethod
    def from_config(
        cls, config: NewLLMConfig, vocabulary_size: int, precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST
    ) -> ContextVectorLM:
        """The model of a configuration. A text of few words can have a smaller vocabulary than asked for."""
        return cls(
            vocabulary_size, config.embed_dim, config.hidden_dim, config.context_dim, config.num_layers,
            config.dropout, precision,
        )  # fmt: skip

    def initial_context(self, batch: int) -> jax.Array:
        """c_0: zeros `[batch, context]`."""
        return jnp.zeros((batch, self.context_dim))

    def setup(self) -> None:
        weights = {"kernel_init": normal(WEIGHT_STD), "precision": self.precision}
        self.embed = nn.Embed(self.vocabulary_size, self.embed_dim, embedding_init=normal(WEIGHT_STD))
        self.token_in = nn.Dense(self.hidden_dim, **weights)
        self.cell = ContextCell(self.hidden_dim, self.num_layers, self.dropout, self.precision, self.loops)
        self.logits = nn.Dense(self.vocabulary_size, **weights)

    def __call__(
        self, ids: jax.Array, context: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Runs over a piece of text; feeding a text in pieces gives what feeding it whole gives.

        Args:
          ids: `[batch, time]` token ids.
          context: `[batch, context]`, the context vector before the first id; None for c_0.
          deterministic: False in training: dropout from the rng `"dropout"`.

        Returns:
          logits `[batch, time, vocabulary]` of the id that follows each position, and the last context vector.
        """
        states, last = self.hidden_states(ids, context, deterministic=deterministic)
        return jnp.swapaxes(self.logits(states), 0, 1), last

    def hidden_states(
        self, ids: jax.Array, context: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """As `__call__`, but the last hidden states `[time, batch, hidden]`, as they are kept, instead of logits."""
        initial = self.initial_context(ids.shape[0]) if context is None else context
        if ids.size < self.vocabulary_size:
            tokens = self.token_in(self.embed(ids.T))
        else:  # the same, with each word's part computed once
            tokens = self.token_in(self.embed.embedding)[ids.T]
        last, states = self.cell(initial, tokens, deterministic)
        return states, last
