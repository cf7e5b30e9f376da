"""New-LLM: a gated context vector of fixed size, carried from token to token through a deep feed-forward network.

At each position t, with c_0 = 0 (report of New-LLM; LayerNorm: Ba et al. 2016):

    h    = ReLU(W_1 [e_t ; c] + b_1), then L - 1 times  h = ReLU(W_l h + b_l)            dropout after every ReLU
    f, i = sigmoid(W_f h + b_f), sigmoid(W_i h + b_i);   d = W_d h + b_d
    c    = clip(LayerNorm(f * c + i * d), -10, 10)
    logits_t = W_o h + b_o

W_1 [e ; c] is computed as W_e e + W_c c: the token's part, like the logits, does not depend on the context and is
computed outside the time loop, for all positions at once.

The options that this model does not have as published: `recurrence/cell.py` has residual layers. Kernels drawn by the
size of their input (He et al. 2015) keep the size of a signal from layer to layer; with a standard deviation of 0.02 it
shrinks. A forget gate with a bias (Jozefowicz et al. 2015) begins by remembering. Output weights can be the embeddings
(Press & Wolf 2017). Dropout of inputs and outputs has one mask a text, that of weights (Wan et al. 2013) and words one
an update, as in AWD-LSTM (Merity et al. 2018).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer, normal, ones, zeros

from newllm_jax.config import Cell, Initialization, NewLLMConfig, Precision, check, checked
from newllm_jax.newllm.dropout import Dropout, Rate
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec, Form
from newllm_jax.newllm.recurrence.gradients import project
from newllm_jax.newllm.recurrence.scan import scan
from newllm_jax.newllm.tokenizer import BOS, PAD
from newllm_jax.training.arrays import check_array
from newllm_jax.training.precision import PRECISIONS, dot

WEIGHT_STD = 0.02
IMPOSSIBLE = -1e30  # a logit; exp of its distance from any other is 0
RELU_GAIN = 2.0  # ReLU halves the mean square of what passes it
DROPOUTS = (
    "dropout", "variational_dropout", "input_dropout", "output_dropout", "weight_dropout", "word_dropout",
)  # fmt: skip


def check_dropouts(settings: Any) -> None:
    """Raises InputError where a rate of dropout is no share below 1."""
    for name in DROPOUTS:
        checked(name, getattr(settings, name), float, least=0, below=1)


def dropout_rates(settings: Any) -> dict[str, Rate]:
    """The rates of the kinds of dropout that are on, by setting, of a model or a configuration."""
    return {name: Rate.from_share(getattr(settings, name)) for name in DROPOUTS if getattr(settings, name) > 0}


def kernel_init(initialization: Initialization, inputs: int, gain: float = 1.0) -> Initializer:
    """How the kernel of a layer is drawn that reads `inputs` numbers; `he`: with variance `gain / inputs`."""
    return normal(WEIGHT_STD if initialization == "normal" else math.sqrt(gain / inputs))


class ContextCell(nn.Module):
    """The recurrent part: declares the weights with which `scan` runs the time loop.

    Attributes:
      embed_dim: of the embeddings, the other part of the first layer's input.
    """

    spec: CellSpec
    embed_dim: int
    initialization: Initialization
    forget_bias: float

    @nn.compact
    def __call__(
        self,
        context: jax.Array,
        tokens: jax.Array,
        rates: Mapping[str, Rate],
        first_text: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`context [B, C]`, `tokens [T, B, H]` -> the last context, and what the gates read `[T, B, H]`.

        Args:
          rates: of the kinds of dropout that are on, by setting.
        """
        spec, hidden, width = self.spec, self.spec.hidden_dim, self.spec.context_dim

        def kernel(name: str, inputs: int, outputs: int, fan_in: int, gain: float = RELU_GAIN) -> jax.Array:
            return self.param(f"{name}_kernel", kernel_init(self.initialization, fan_in, gain), (inputs, outputs))

        def layer(name: str) -> tuple[jax.Array, jax.Array]:
            return kernel(name, hidden, hidden, hidden), self.param(f"{name}_bias", zeros, (hidden,))

        def gate_biases(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jnp.zeros(shape).at[:width].set(self.forget_bias)

        params = CellParams(
            context_in=kernel("context_in", width, hidden, self.embed_dim + width),
            hidden=tuple(layer(f"hidden_{number}") for number in range(2, spec.num_layers + 1)),
            gates=(kernel("gates", hidden, 3 * width, hidden, 1), self.param("gates_bias", gate_biases, (3 * width,))),
            norm=(self.param("norm_scale", ones, (width,)), self.param("norm_bias", zeros, (width,))),
        )
        first = 0 if first_text is None else first_text * hidden
        step, text = (
            Dropout.from_key(self.make_rng("dropout"), rates[name], first) if name in rates else None
            for name in ("dropout", "variational_dropout")
        )
        if "weight_dropout" in rates:
            params = self._drop_weights(params, rates["weight_dropout"])
        return scan(spec, params, context, tokens, CellDropout(step, text))

    def _drop_weights(self, params: CellParams, rate: Rate) -> CellParams:
        """DropConnect of all kernels. The masks follow from the key alone: all texts of an update share them."""

        def drop(kernel: jax.Array) -> jax.Array:
            return Dropout.from_key(self.make_rng("dropout"), rate).drop(kernel)

        return CellParams(
            drop(params.context_in),
            tuple((drop(kernel), bias) for kernel, bias in params.hidden),
            (drop(params.gates[0]), params.gates[1]),
            params.norm,
        )


class Head(nn.Module):
    """The output layer: hidden states to logits.

    Attributes:
      embed_dim: of the embeddings that are its kernel, after a projection to them; None for a kernel of its own.
      excluded: ids that never follow; their logits are so low that they have no probability.
    """

    hidden_dim: int
    vocabulary_size: int
    precision: Precision
    initialization: Initialization
    embed_dim: int | None = None
    excluded: tuple[int, ...] = ()

    def setup(self) -> None:
        tied, init = self.embed_dim is not None, kernel_init(self.initialization, self.hidden_dim)
        if tied:
            self.projection = self.param("projection", init, (self.hidden_dim, self.embed_dim))
        else:
            self.kernel = self.param("kernel", init, (self.hidden_dim, self.vocabulary_size))
        self.bias = self.param("bias", zeros, (self.vocabulary_size,))

    def __call__(self, states: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The factors of the logits, which a loss multiplies itself.

        Args:
          states: `[T, B, H]`.
          embedding: `[V, E]`.

        Returns:
          inputs `[T, B, K]`, kernel `[K, V]` and bias `[V]`, K being H or, with tied embeddings, E.
        """
        bias = self.bias.at[jnp.array(self.excluded)].set(IMPOSSIBLE) if self.excluded else self.bias
        if self.embed_dim is None:
            return states, self.kernel, bias
        return project(states, self.projection, self.precision), embedding.T, bias


class ContextVectorLM(nn.Module):
    """The language model: ids and a context vector in, logits and the context vector after the last id out.

    Attributes:
      vocabulary_size ... word_dropout: the settings of the same names (`config.NewLLMConfig`).
      precision: of every matrix product.
      form: of the time loop; see `recurrence.scan.forms_for`.
      mask_texts: of the dropout masks; see `recurrence.cell.CellSpec`.
      excluded: ids that never follow; in a stream, packed too, those of padding and of the beginning of a text.
    """

    vocabulary_size: int = 1000
    embed_dim: int = 256
    hidden_dim: int = 512
    context_dim: int = 256
    num_layers: int = 6
    cell: Cell = "plain"
    initialization: Initialization = "normal"
    forget_bias: float = 0.0
    tie_embeddings: bool = False
    dropout: float = 0.1
    variational_dropout: float = 0.0
    input_dropout: float = 0.0
    output_dropout: float = 0.0
    weight_dropout: float = 0.0
    word_dropout: float = 0.0
    precision: Precision = "fp32"
    form: Form = "plain"
    mask_texts: int | None = None
    excluded: tuple[int, ...] = ()

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
        excluded = () if config.text == "windows" else (PAD, BOS)
        return cls(vocabulary_size, precision=precision, excluded=excluded, **settings)

    @property
    def spec(self) -> CellSpec:
        """The specification of the cell: its fields are the attributes of the same name."""
        return CellSpec(**{field.name: getattr(self, field.name) for field in dataclasses.fields(CellSpec)})

    @property
    def rates(self) -> dict[str, Rate]:
        """The kinds of dropout that training has, by setting."""
        return dropout_rates(self)

    def initial_context(self, batch: int) -> jax.Array:
        """c_0: zeros `[B, C]`."""
        checked("batch", batch, int, least=1)
        return jnp.zeros((batch, self.context_dim))

    def setup(self) -> None:
        for name in ("vocabulary_size", "embed_dim", "hidden_dim", "context_dim", "num_layers"):
            checked(name, getattr(self, name), int, least=1)
        check_dropouts(self)
        for name, kind in (("precision", Precision), ("cell", Cell), ("initialization", Initialization)):
            checked(name, getattr(self, name), kind)
        embed, kind = self.embed_dim, self.initialization
        # An embedding is the kernel of the output layer, or of a layer that reads a single 1.
        inputs = embed if self.tie_embeddings else 1
        self.embed = nn.Embed(self.vocabulary_size, embed, embedding_init=kernel_init(kind, inputs))
        self.token_in = nn.Dense(
            self.hidden_dim,
            kernel_init=kernel_init(kind, embed + self.context_dim, RELU_GAIN),
            precision=PRECISIONS[self.precision],
        )
        self.cell_loop = ContextCell(self.spec, embed, kind, self.forget_bias, name="cell")
        self.logits = Head(
            self.hidden_dim, self.vocabulary_size, self.precision, kind, embed if self.tie_embeddings else None,
            self.excluded,
        )  # fmt: skip

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
        inputs, kernel, bias = self.head(states)
        return jnp.swapaxes(dot(inputs, kernel, self.precision) + bias, 0, 1), last

    def hidden_states(
        self,
        ids: jax.Array,
        context: jax.Array | None = None,
        *,
        deterministic: bool = True,
        rates: Mapping[str, Rate] | None = None,
        first_text: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `__call__`, but the states `[T, B, H]` that the output layer reads instead of logits.

        Args:
          rates: of dropout in the place of the model's, of the same kinds.
          first_text: the place of the first text in a batch of `mask_texts`, a part of which `ids` are.
        """
        check_array("ids", ids, "integers", "B", "T")
        initial = self.initial_context(ids.shape[0]) if context is None else context
        check_array("context", initial, "numbers", ids.shape[0], self.context_dim)
        rates = {} if deterministic else rates or self.rates

        def drop_by_text(name: str, x: jax.Array) -> jax.Array:
            if name not in rates:
                return x
            first = 0 if first_text is None else first_text * x.shape[-1]
            return Dropout.from_key(self.make_rng("dropout"), rates[name], first).drop(x, x.shape[1:])

        embedding = self.embed.embedding
        if "word_dropout" in rates:
            words = Dropout.from_key(self.make_rng("dropout"), rates["word_dropout"])
            embedding = words.drop(embedding, (self.vocabulary_size, 1))
        if ids.size < self.vocabulary_size or "input_dropout" in rates:
            tokens = self.token_in(drop_by_text("input_dropout", embedding[ids.T]))
        else:  # the same, with each word's part computed once
            tokens = self.token_in(embedding)[ids.T]
        last, states = self.cell_loop(initial, tokens, rates, first_text)
        return drop_by_text("output_dropout", states), last

    def head(self, states: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The factors of the logits of some states; see `Head`."""
        return self.logits(states, self.embed.embedding)
