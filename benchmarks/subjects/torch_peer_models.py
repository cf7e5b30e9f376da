"""The peers' models in PyTorch: an LSTM with the dropouts of AWD-LSTM, and a GPT. Importing this module needs PyTorch.

Both read ids and a state and give logits and the next state; a GPT's state is empty, since it reads windows only. Axes:
B batch, T time, E embedding, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.subjects.peer_config import PeerConfig
from benchmarks.subjects.torch_training import Tensor, device, torch

functional: Any = torch.nn.functional
State = list[Tensor]  # hidden and cell state [1, B, H] of every layer of an LSTM
NEVER = -1e9  # the logit of a word that cannot follow


def compute_type() -> Any:
    """The type of products: what autocast says where it is on, else float32."""
    return torch.get_autocast_dtype(device()) if torch.is_autocast_enabled(device()) else torch.float32


def one_mask(shape: Sequence[int], share: float, like: Tensor) -> Tensor:
    """A dropout mask in the type of `like`: 0 for a share of its places, 1 / (1 - share) elsewhere."""
    return torch.empty(*shape, dtype=like.dtype, device=like.device).bernoulli_(1 - share).div_(1 - share)


class Lstm(torch.nn.Module):
    """cuDNN's LSTM layer by layer, with one dropout mask a sequence, and DropConnect (Merity et al. 2018).

    Args:
      excluded: ids that can never follow.
    """

    time_major = True  # logits are [T, B, V]

    def __init__(self, config: PeerConfig, vocabulary: int, excluded: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        last = config.embed if config.tie else config.hidden
        self.sizes = [config.embed, *[config.hidden] * (config.layers - 1), last]
        self.embedding = torch.nn.Parameter(torch.empty(vocabulary, config.embed).uniform_(-0.1, 0.1))
        self.layers = torch.nn.ModuleList(
            torch.nn.LSTM(read, given) for read, given in zip(self.sizes, self.sizes[1:], strict=False)
        )
        for layer in self.layers:
            half = layer.hidden_size
            with torch.no_grad():  # of the gates' order, the second is the forget gate
                layer.bias_ih_l0[half : 2 * half] = 1
                layer.bias_hh_l0[half : 2 * half] = 0
        if not config.tie:
            self.kernel = torch.nn.Parameter(torch.empty(vocabulary, last).uniform_(-0.1, 0.1))
        self.bias = torch.nn.Parameter(torch.zeros(vocabulary))
        never = torch.zeros(vocabulary)
        never[list(excluded)] = NEVER
        self.register_buffer("never", never)

    def start(self, rows: int) -> State:
        """The state before a stream of so many rows."""
        return [torch.zeros(1, rows, size, device=device()) for size in self.sizes[1:] for _ in range(2)]

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits `[T, B, V]` of what follows `ids [B, T]` after a state, and the state after them."""
        config, ids, after = self.config, ids.t(), []
        states = functional.embedding(ids, self.embedding)
        if self.training and config.word_dropout:
            states = states * functional.embedding(ids, one_mask((len(self.embedding), 1), config.word_dropout, states))
        states = self.locked(states, config.input_dropout)
        for number, layer in enumerate(self.layers):
            states, *given = self.read(layer, states, state[2 * number : 2 * number + 2])
            after += given
            last = number == config.layers - 1
            states = self.locked(states, config.output_dropout if last else config.between_dropout)
        kernel = self.embedding if config.tie else self.kernel
        return functional.linear(states, kernel, self.bias + self.never), after

    def read(self, layer: Any, inputs: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """A layer over `inputs [T, B, E or H]`: outputs, last hidden and cell state.

        Autocast would compute in float16 here, whatever type it was asked for, so the weights are converted by hand.
        They are views of one array, as cuDNN reads them.
        """
        recurrent = functional.dropout(layer.weight_hh_l0, self.config.weight_dropout, self.training)
        weights, kind = [layer.weight_ih_l0, recurrent, layer.bias_ih_l0, layer.bias_hh_l0], compute_type()
        flat = torch.cat([weight.flatten() for weight in weights]).to(kind)
        views = flat.split([weight.numel() for weight in weights])
        shaped = [view.view(weight.shape) for view, weight in zip(views, weights, strict=True)]
        before = tuple(each.to(kind) for each in state)
        with torch.autocast(device(), enabled=False):
            return torch._VF.lstm(inputs.to(kind), before, shaped, True, 1, 0.0, self.training, False, False)

    def locked(self, states: Tensor, share: float) -> Tensor:
        """Dropout of `[T, B, H]` with one mask for all steps."""
        if not self.training or not share:
            return states
        return states * one_mask((1, *states.shape[1:]), share, states)


class Block(torch.nn.Module):
    """A layer of a GPT: causal attention, then a feed-forward layer of four times the width, each after a norm."""

    def __init__(self, config: PeerConfig) -> None:
        super().__init__()
        width, self.config = config.hidden, config
        self.first_norm, self.second_norm = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.queries, self.mixed = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.wide, self.narrow = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        """`[B, T, H]` -> `[B, T, H]`."""
        states = states + self.dropped(self.mixed(self.attention(self.queries(self.first_norm(states)))))
        return states + self.dropped(self.narrow(functional.gelu(self.wide(self.second_norm(states)))))

    def attention(self, queries: Tensor) -> Tensor:
        """Of queries, keys and values `[B, T, 3 H]`: `[B, T, H]`."""
        heads = [part.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for part in queries.chunk(3, -1)]
        share = self.config.attention_dropout if self.training else 0.0
        return (
            functional.scaled_dot_product_attention(*heads, dropout_p=share, is_causal=True).transpose(1, 2).flatten(-2)
        )

    def dropped(self, added: Tensor) -> Tensor:
        """What a branch adds, with dropout in training."""
        share = self.config.residual_dropout
        return functional.dropout(added, share) if self.training and share else added


class Gpt(torch.nn.Module):
    """A GPT with learned positions and norms before its layers (Radford et al. 2019).

    Args:
      length: the largest number of ids that it reads.
    """

    time_major = False  # logits are [B, T, V]

    def __init__(self, config: PeerConfig, vocabulary: int, length: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = torch.nn.Parameter(torch.empty(vocabulary, config.hidden))
        self.positions = torch.nn.Parameter(torch.empty(length, config.hidden))
        self.blocks = torch.nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = torch.nn.LayerNorm(config.hidden)
        if not config.tie:
            self.kernel = torch.nn.Parameter(torch.empty(vocabulary, config.hidden))
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                residual = name.endswith(("mixed.weight", "narrow.weight"))
                torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(weight)

    def start(self, rows: int) -> State:
        """No state."""
        return []

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits `[B, T, V]` of what follows `ids [B, T]`; the state as it is."""
        states = functional.embedding(ids, self.embedding) + self.positions[: ids.shape[1]]
        if self.training and self.config.input_dropout:
            states = functional.dropout(states, self.config.input_dropout)
        for block in self.blocks:
            states = block(states)
        return functional.linear(self.norm(states), self.embedding if self.config.tie else self.kernel), state
