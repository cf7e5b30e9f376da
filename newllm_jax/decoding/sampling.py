"""How a generated word or token is chosen from logits: temperature, the k most probable, the nucleus."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from newllm_jax.config import check, check_fields, setting


@dataclass(frozen=True)
class Sampling:
    """How the next word is chosen.

    Attributes:
      temperature: 0 takes the most probable word; 1 samples as the model says.
      top_k: only the k most probable words; 0 for all.
      top_p: only the most probable words that together have this probability; 1 for all.
      unknown: whether New-LLM's `<UNK>`, three words in ten of its data, may be chosen.

    >>> Sampling(temperature=0)  # the most probable word, always
    Sampling(temperature=0.0, top_k=0, top_p=0.95, unknown=False)
    """

    temperature: float = setting(0.8, least=0, most=1000)
    top_k: int = setting(0, least=0, most=10**9)
    top_p: float = setting(0.95, least=1e-30, most=1)
    unknown: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            "temperature", self.temperature, "0, or at least 0.001", self.temperature == 0 or self.temperature >= 1e-3
        )


def narrow(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits `[V]` at the temperature, with every id ruled out (-inf) that `top_k` and `top_p` exclude."""
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    ranked = jnp.sort(logits, descending=True)
    if sampling.top_k:
        logits = jnp.where(logits < ranked[min(sampling.top_k, len(ranked)) - 1], -jnp.inf, logits)
    if sampling.top_p < 1:
        # A word stays while the words before it have not yet reached top_p; the most probable one always does.
        probabilities = jax.nn.softmax(ranked)
        kept = jnp.cumsum(probabilities) - probabilities < sampling.top_p
        logits = jnp.where(logits < jnp.min(ranked, where=kept, initial=jnp.inf), -jnp.inf, logits)
    return logits


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """The id chosen from logits `[V]` that are narrowed already, as a scalar."""
    chosen = jnp.argmax(logits) if sampling.temperature == 0 else jax.random.categorical(key, logits)
    return chosen.astype(jnp.int32)


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """The id chosen from logits `[V]`, as a scalar: narrowed first, unless only the most probable one can be chosen."""
    return choose(logits if sampling.temperature == 0 else narrow(logits, sampling), sampling, key)
