"""Which tokens are hard: a score per token, a quantile of the scores as threshold, and the rule `score <= threshold`.

The report of CASCADE calls a token hard where the last hidden state has turned away from the embedding: cosine
similarity. Entropy and maximum probability of the prediction, as early-exit models use them (CALM, Schuster et al.
2022), are the other criteria. Every score is low for hard tokens, so that one rule serves all; entropy is negated.

>>> scores = np.array([0.1, 0.9, 0.5, 0.3, 0.7], np.float32)
>>> threshold = hardness_threshold(scores, hard_ratio=0.6)
>>> is_hard(scores, threshold)
array([ True, False,  True,  True, False])
>>> stage_counts(1000, hard_ratio=0.6, stages=3)  # how many tokens reach each
[600, 360, 216]
"""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.config import Criterion, check, checked
from newllm_jax.errors import InputError, NumericalError
from newllm_jax.training.arrays import check_array


def token_scores(criterion: Criterion, h_in: jax.Array, h_out: jax.Array, logits: jax.Array) -> jax.Array:
    """The score of each token by a criterion: low is hard.

    Args:
      criterion: `cosine`, `entropy`, `max_probability` or `margin`.
      h_in: `[..., H]`, what the model (or stage) read: its embedding, or its input.
      h_out: `[..., H]`, its last hidden state, after the final norm.
      logits: `[..., V]`, its prediction.

    Returns:
      `[...]` float32. What a criterion does not need is not computed under `jax.jit`.
    """
    checked("criterion", criterion, Criterion)
    if criterion == "cosine":
        return cosine_similarity(h_in, h_out)
    if criterion == "entropy":
        return -predictive_entropy(logits)
    if criterion == "margin":
        return margin(logits)
    check("criterion", criterion, "a score of a single pass; a probe is trained first", criterion != "probe")
    return max_probability(logits)


def cosine_similarity(h_in: jax.Array, h_out: jax.Array) -> jax.Array:
    """Cosine of the angle between two vectors, each `[..., H]`; 0 where one of them is zero."""
    check_array("h_in", h_in, "numbers", "...", "H")
    check_array("h_out", h_out, "numbers", *h_in.shape)
    h_in, h_out = h_in.astype(jnp.float32), h_out.astype(jnp.float32)
    norms = jnp.linalg.norm(h_in, axis=-1) * jnp.linalg.norm(h_out, axis=-1)
    return jnp.sum(h_in * h_out, axis=-1) / jnp.maximum(norms, 1e-8)


def predictive_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of the distribution that `logits [..., V]` stand for."""
    check_array("logits", logits, "numbers", "...", "V")
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)


def max_probability(logits: jax.Array) -> jax.Array:
    """Probability of the likeliest id in `logits [..., V]`."""
    check_array("logits", logits, "numbers", "...", "V")
    return jnp.exp(jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), axis=-1))


def margin(logits: jax.Array) -> jax.Array:
    """Probability of the likeliest id in `logits [..., V]` less that of the next."""
    check_array("logits", logits, "numbers", "...", "V")
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    likeliest = jax.lax.top_k(probabilities, 2)[0]
    return likeliest[..., 0] - likeliest[..., 1]


def hardness_threshold(scores: np.ndarray | jax.Array, hard_ratio: float) -> float:
    """The `hard_ratio` quantile of the scores, linearly interpolated between the two nearest.

    Interpolated in float64, then rounded down to float32: for float32 scores, and on any device, `score <= threshold`
    then says exactly what it says of the quantile itself, where rounding up could let one token more in.

    Raises:
      InputError: `hard_ratio` is not between 0 and 1, or there are no scores.
      NumericalError: a score is not a number.
    """
    check_array("scores", scores, "numbers", "...")
    values = np.sort(np.asarray(scores), axis=None)  # there can be hundreds of millions: no copy in float64
    lower, fraction = _quantile_position(values.size, hard_ratio)
    if np.isnan(values[-1]):
        raise NumericalError("hardness: a token's score is not a number")
    quantile = np.float64(values[lower])
    if fraction:
        quantile += (np.float64(values[lower + 1]) - quantile) * fraction
    rounded = np.float32(quantile)
    return float(rounded if rounded <= quantile else np.nextafter(rounded, np.float32(-np.inf)))


def is_hard(scores: Any, threshold: float | jax.Array) -> Any:
    """The rule, for one score or an array of them: a token is hard at or below the threshold.

    The ensemble and generation both ask it, so that a token exits at the same place in both.

    Args:
      threshold: as an array a float32 scalar, where scores and threshold are computed with under `jax.jit`.
    """
    if not isinstance(threshold, jax.Array):
        threshold = cast(Any, np.float32(checked("threshold", threshold, float)))
    return scores <= threshold


def select_hard(scores: np.ndarray | jax.Array, threshold: float) -> np.ndarray:
    """Indices of the hard tokens in `scores [tokens]`, in order: those at or below the threshold.

    Tokens that share the threshold's score are all hard, as they would all be handed on in the ensemble; so with ties
    there can be more than `count_hard` says, never fewer.
    """
    check_array("scores", scores, "numbers", "tokens")
    return np.flatnonzero(is_hard(scores, threshold))


def count_hard(tokens: int, hard_ratio: float) -> int:
    """How many of `tokens` with different scores are hard: those up to the quantile's position, itself included."""
    return _quantile_position(tokens, hard_ratio)[0] + 1


def stage_counts(tokens: int, hard_ratio: float, stages: int) -> list[int]:
    """How many of `tokens` each of the stages gets, each the hard ones of the stage before.

    Raises:
      InputError: a single token is left for a stage to take a share of.
    """
    checked("stages", stages, int, least=1)
    counts: list[int] = []
    for stage in range(1, stages + 1):
        if tokens < 2:
            raise InputError(
                f"num_stages: no hard tokens are left for stage {stage} (only {tokens} before it); use fewer stages, "
                "a higher hard_ratio or more chunks"
            )
        tokens = count_hard(tokens, hard_ratio)
        counts.append(tokens)
    return counts


def _quantile_position(tokens: int, hard_ratio: float) -> tuple[int, float]:
    """The rank (from 0) at or below the quantile, and how far it is to the next."""
    hard_ratio = checked("hard_ratio", hard_ratio, float, above=0, below=1)
    if checked("tokens", tokens, int) < 1:
        raise InputError("hard_ratio: no tokens are left to choose hard ones from; use fewer stages or a higher ratio")
    position = (tokens - 1) * hard_ratio
    lower = math.floor(position)
    return lower, position - lower
