"""What a token costs: the products with weights that are computed for it, in passes of the base.

A pass of SmolLM2-135M is 30 layers and a head that costs as much as 8 of them. Norms, rotary positions and attention's
products of activations are left out everywhere; those are about 2 % at 128 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from newllm_jax.config import Criterion
from newllm_jax.smollm.llama_config import LlamaConfig

PROBE_WIDTH = 64  # of the inner layer of a probe


def probe_cost(config: LlamaConfig) -> int:
    """Multiplications of a probe for one token."""
    return (config.hidden_size + 1) * PROBE_WIDTH


@dataclass(frozen=True)
class Costs:
    """Multiplications for one token, by part of a Llama."""

    layer: int
    query: int
    keys_and_values: int  # of a layer, for a token that does not pass it but is seen by those that do
    head: int
    layers: int

    @classmethod
    def from_config(cls, config: LlamaConfig) -> Costs:
        """Of the parts of a model."""
        hidden, query = config.hidden_size, config.num_heads * config.head_dim
        value = config.num_kv_heads * config.head_dim
        layer = 2 * hidden * query + 2 * hidden * value + 3 * hidden * config.intermediate_size
        return cls(layer, hidden * query, 2 * hidden * value, hidden * config.vocab_size, config.num_layers)

    @property
    def lone_token_layer(self) -> int:
        """A layer on a token that sees only itself: attention passes its value on, without query or key."""
        return self.layer - self.query - self.keys_and_values // 2

    def published_stage(self, layers: int, criterion: Criterion) -> int:
        """What a stage of the published design adds: by the cosine no head, as only the last model's is needed."""
        return layers * self.lone_token_layer + (0 if criterion == "cosine" else self.head)

    @property
    def base(self) -> int:
        """A pass of the whole model."""
        return self.layers * self.layer + self.head


@dataclass(frozen=True)
class PathCosts:
    """The cost of each path of a design, in passes of the base, the decision between them included.

    Attributes:
      easy, hard: of a token that takes this path.
    """

    easy: float
    hard: float

    def mean(self, hard_share: float) -> float:
        """Of a token, where this share of them is hard."""
        return self.easy + hard_share * (self.hard - self.easy)

    def hard_share(self, mean: float) -> float:
        """The share of hard tokens with which a token costs so much on average, from none to all."""
        return min(max((mean - self.easy) / (self.hard - self.easy), 0.0), 1.0)
