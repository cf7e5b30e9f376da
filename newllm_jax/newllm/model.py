"""New-LLM: a gated context vector of fixed size, carried from token to token through a deep feed-forward network.

At each position t, with c_0 = 0 (report of New-LLM; LayerNorm: Ba et al. 2016):

    h    = ReLU(W_1 [e_t ; c] + b_1), then L - 1 times  h = ReLU(W_l h + b_l)            dropout after every ReLU
    f, i = sigmoid(W_f h + b_f), sigmoid(W_i h + b_i);   d = W_d h + b_d
    c    = clip(LayerNorm(f * c + i * d), -10, 10)
    logits_t = W_o h + b_o

W_1 [e ; c] is computed as W_e e + W_c c: the token's part, like the logits, does not depend on the context and is
computed outside the time loop, for all positions at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import normal, ones, zeros

from newllm_jax.config import NewLLMConfig, Precision, check, checked
from newllm_jax.newllm.recurrence.cell import CellParams, CellSpec, Form, dropout_seeds
from newllm_jax.newllm.recurrence.scan import scan
from newllm_jax.training.arrays import check_array
from newllm_jax.training.precision import PRECISIONS, dot

WEIGHT_STD = 0.02


class ContextCell(nn.Module):
    """The recurrent part: declares the weights with which `scan` runs the time loop."""

    spec: CellSpec

    @nn.compact
    def __call__(
        self, context: jax.Array, tokens: jax.Array, deterministic: bool, first_text: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """`context [B, C]`, `tokens [T, B, H]` -> the last context, and the last layer's activations `[T, B, H]`."""
        spec = self.spec

        def layer(name: str, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
            return (
                self.param(f"{name}_kernel", normal(WEIGHT_STD), (inputs, outputs)),
                self.param(f"{name}_bias", zeros, (outputs,)),
            )

        hidden, width = spec.hidden_dim, spec.context_dim
        params = CellParams(
            context_in=self.param("context_in_kernel", normal(WEIGHT_STD), (width, hidden)),
            hidden=tuple(layer(f"hidden_{number}", hidden, hidden) for number in range(2, spec.num_layers + 1)),
            gates=layer("gates", hidden, 3 * width),
            norm=(self.param("norm_scale", ones, (width,)), self.param("norm_bias", zeros, (width,))),
        )
        dropped = not deterministic and spec.dropout > 0
        first = None if first_text is None else first_text * hidden
        seeds = dropout_seeds(self.make_rng("dropout"), first) if dropped else None
        return scan(spec, params, context, tokens, seeds)


class Head(nn.Module):
    """The output layer: hidden states to logits."""

    hidden_dim: int
    vocabulary_size: int
    precision: Precision

    def setup(self) -> None:
        self.kernel = self.param("kernel", normal(WEIGHT_STD), (self.hidden_dim, self.vocabulary_size))
        self.bias = self.param("bias", zeros, (self.vocabulary_size,))

    def __call__(self, states: jax.Array) -> jax.Array:
        """`[..., H]` -> `[..., V]`."""
        return dot(states, self.kernel, self.precision) + self.bias

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """Kernel `[H, V]` and bias `[V]`, for a loss that computes the logits itself."""
        return self.kernel, self.bias


class ContextVectorLM(nn.Module):
    """The language model: ids and a context vector in, logits and the context vector after the last id out.

    Attributes:
      dropout: the share of activations that training drops after every ReLU.
      precision: of every matrix product.
      form: of the time loop; see `recurrence.scan.form_for`.
      mask_texts: of the dropout masks; see `recurrence.cell.CellSpec`.
    """

    vocabulary_size: int = 1000
    embed_dim: int = 256
    hidden_dim: int = 512
    context_dim: int = 256
    num_layers: int = 6
    dropout: float = 0.1
    precision: Precision = "fp32"
    form: Form = "plain"
    mask_texts: int | None = None

    @classmethod
    def from_config(
        cls, config: NewLLMConfig, vocabulary_size: int, precision: Precision = "fp32"
    ) -> ContextVectorLM:  # fmt: skip
        """The model of a configuration: its settings are the attributes of the same name.

        Args:
          vocabulary_size: that of the data, which can be smaller than the configured one.
          precision: the resolved one.
        """
        check("config", config, "a NewLLMConfig", isinstance(config, NewLLMConfig))
        names = {field.name for field in dataclasses.fields(cls)} & {field.name for field in dataclasses.fields(config)}
        settings = {name: getattr(config, name) for name in names - {"vocabulary_size", "precision"}}
        return cls(vocabulary_size, precision=precision, **settings)

    @property
    def spec(self) -> CellSpec:
        """The specification of the cell: its fields are the attributes of the same name."""
        return CellSpec(**{field.name: getattr(self, field.name) for field in dataclasses.fields(CellSpec)})

    def initial_context(self, batch: int) -> jax.Array:
        """c_0: zeros `[B, C]`."""
        checked("batch", batch, int, least=1)
        return jnp.zeros((batch, self.context_dim))

    def setup(self) -> None:
        for name in ("vocabulary_size", "embed_dim", "hidden_dim", "context_dim", "num_layers"):
            checked(name, getattr(self, name), int, least=1)
        checked("dropout", self.dropout, float, least=0, below=1)
        checked("precision", self.precision, Precision)
        self.embed = nn.Embed(self.vocabulary_size, self.embed_dim, embedding_init=normal(WEIGHT_STD))
        self.token_in = nn.Dense(
            self.hidden_dim, kernel_init=normal(WEIGHT_STD), precision=PRECISIONS[self.precision]
        )  # fmt: skip
        self.cell = ContextCell(self.spec)
        self.logits = Head(self.hidden_dim, self.vocabulary_size, self.precision)

    def __call__(
        self, ids: jax.Array, context: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Runs over a piece of text. A text in several pieces gives the same logits as the text as a whole.

        Args:
          ids: `[B, T]` token ids.
          context: `[B, C]`, the context vector before the first id; None for c_0.
          deterministic: False in training: dropout from the rng `"dropout"`.

        Returns:
          logits `[B, T, V]` of the id that follows each position, and the last context vector `[B, C]`.

        Raises:
          InputError: arrays of another kind or shape, or attributes that no model can have.
        """
        states, last = self.hidden_states(ids, context, deterministic=deterministic)
        return jnp.swapaxes(self.logits(states), 0, 1), last

    def hidden_states(
        self,
        ids: jax.Array,
        context: jax.Array | None = None,
        *,
        deterministic: bool = True,
        first_text: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `__call__`, but the last layer's activations `[T, B, H]` instead of logits.

        Args:
          first_text: the place of the first text in a batch of `mask_texts`, a part of which `ids` are.
        """
        check_array("ids", ids, "integers", "B", "T")
        initial = self.initial_context(ids.shape[0]) if context is None else context
        check_array("context", initial, "numbers", ids.shape[0], self.context_dim)
        if ids.size < self.vocabulary_size:
            tokens = self.token_in(self.embed(ids.T))
        else:  # the same, with each word's part computed once
            tokens = self.token_in(self.embed.embedding)[ids.T]
        last, states = self.cell(initial, tokens, deterministic, first_text)
        return states, last

    def head(self) -> Any:
        """Kernel `[H, V]` and bias `[V]` of the output layer, wherever the parameters keep them."""
        return self.logits.weights()
