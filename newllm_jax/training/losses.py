"""Cross-entropy of next-token predictions, as sums over targets, and the means that are reported."""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class Sums:
    """Sums over the targets of one or many batches, from which means are taken once, at the end.

    Attributes:
      loss: summed cross-entropy (nats).
      hits: targets whose logit is the largest; of equal ones the first alone need count.
      count: targets.
    """

    loss: jax.Array
    hits: jax.Array
    count: jax.Array

    @classmethod
    def zero(cls) -> Sums:
        """Nothing summed yet."""
        return cls(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def __add__(self, other: Sums) -> Sums:
        return jax.tree.map(jnp.add, self, other)


def token_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy (nats) of each target, and whether it is the arg-max: `logits [..., V]`, the others `[...]`."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses, jnp.argmax(logits, -1) == targets


def summed_losses(logits: jax.Array, targets: jax.Array, counted: jax.Array) -> Sums:
    """The sums over the `counted` targets: `logits [..., V]`, the others `[...]`."""
    losses, hits = token_losses(logits, targets)
    return Sums(loss=jnp.sum(losses, where=counted), hits=jnp.sum(hits & counted), count=jnp.sum(counted))


def mean_metrics(sums: Sums) -> dict[str, float]:
    """Loss (nats per target), perplexity and accuracy from sums."""
    count = max(int(sums.count), 1)
    loss = float(sums.loss) / count
    return {"loss": loss, "ppl": perplexity(loss), "accuracy": int(sums.hits) / count}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
