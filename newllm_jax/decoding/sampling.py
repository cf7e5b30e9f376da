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
    narrowed = logits
    if sampling.top_k:
        narrowed = _largest(narrowed, jnp.ones_like(logits), sampling.top_k)
    if sampling.top_p < 1:
        # A word stays while the words before it have not yet reached top_p; the most probable one always does. The
        # probabilities are those among all words, whatever top_k excludes.
        narrowed = _largest(narrowed, jax.nn.softmax(logits), sampling.top_p)
    return narrowed


def _largest(x: jax.Array, weights: jax.Array, bound: float) -> jax.Array:
    """The numbers of `x` before which, from the largest on, the sum of the weights is below a bound; the others -inf.

    The least number that stays is found four bits at a time, each from 15 sums. Sorting takes a CPU longer, and bit by
    bit would be 32 kernels one after the other on a GPU.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # In the order of the numbers: the sign bit set where it was not, and all bits turned round in negative ones.
    places = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))
    # The largest place whose larger numbers reach the bound; it is 0 if there is none, for no number has that place.
    place = jnp.uint32(0)
    for shift in range(28, -1, -4):
        candidates = place + (jnp.arange(1, 16, dtype=jnp.uint32) << shift)
        sums = jnp.sum(jnp.where(places > candidates[:, None], weights, 0.0), axis=1)
        place += jnp.sum(sums >= bound).astype(jnp.uint32) << shift  # the sums fall from candidate to candidate
    return jnp.where(places > place, x, -jnp.inf)


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """The id chosen from logits `[V]` that are narrowed already, as a scalar."""
    chosen = jnp.argmax(logits) if sampling.temperature == 0 else jax.random.categorical(key, logits)
    return chosen.astype(jnp.int32)


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """The id chosen from logits `[V]`, as a scalar: narrowed first, unless only the most probable one can be chosen."""
    return choose(logits if sampling.temperature == 0 else narrow(logits, sampling), sampling, key)
