"""Dynamic evaluation: a model that goes on learning from the text it is measured on (Krause et al. 2018).

The text is read segment by segment. The loss of a segment is measured first; then the parameters p follow its
gradient g, and are drawn back to the trained ones, p_0:

    p <- p - rate * g / (r + epsilon) + min(decay * r / mean(r), 1) * (p_0 - p)

r is the root mean square of each parameter's gradient over segments of the train split. No loss is measured with
parameters that have seen its words. Rate and decay are chosen on the first part of the validation split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.loss import initial_carry
from newllm_jax.newllm.sequences import cut_stream
from newllm_jax.newllm.wikitext import Wikitext
from newllm_jax.training.gradient import LossFn
from newllm_jax.training.losses import Sums, mean_metrics
from newllm_jax.training.split import Carry
from newllm_jax.training.step import Params, count_parameters

SEGMENT = 5  # words
EPSILON = 1e-3
RATES, DECAYS = (5e-4, 1e-3, 2e-3), (5e-3, 1e-2, 2e-2)
CHOICE_SEGMENTS = 8_000  # of the validation split, that rate and decay are chosen on
SIZE_ROWS = 64  # of the train split, whose segments are read side by side
AT_ONCE = 500  # segments in a compiled call


class Adaptation(NamedTuple):
    """How much is learnt from a segment, and how much is forgotten of it at the next: scalars, or `[members]`."""

    rate: Any
    decay: Any


class State(NamedTuple):
    """Of one model that reads a text.

    Attributes:
      params: as they are by now.
      carry: the context vector by now.
      sums: of the losses so far.
    """

    params: Params
    carry: Carry
    sums: Sums


def evaluate_dynamically(loss: LossFn, params: Params, data: Wikitext, config: NewLLMConfig) -> dict[str, Any]:
    """Loss, perplexity and accuracy of validation and test split, and the rate and decay that were chosen."""
    sizes = gradient_sizes(loss, params, data.sequences["train"], config)
    read = partial(read_text, make_reader(loss), params, sizes, config=config)
    grid = Adaptation(*np.array([(rate, decay) for rate in RATES for decay in DECAYS], np.float32).T)
    chosen_on = data.sequences["validation"][: CHOICE_SEGMENTS * SEGMENT + 1]
    tried = read(chosen_on, adaptation=grid)
    best = min(range(len(tried)), key=lambda member: tried[member]["loss"])
    chosen = Adaptation(*(values[best : best + 1] for values in grid))
    figures = {name: read(data.sequences[name], adaptation=chosen)[0] for name in ("validation", "test")}
    settings = {"segment": SEGMENT, "epsilon": EPSILON, "rate": float(chosen.rate[0]), "decay": float(chosen.decay[0])}
    return {**settings, "chosen_on_targets": len(chosen_on) - 1, **figures}


def gradient_sizes(loss: LossFn, params: Params, ids: np.ndarray, config: NewLLMConfig) -> Params:
    """r: the root mean square of each parameter's gradient over segments of a stream of ids."""
    pieces = jnp.asarray(cut_stream(ids, SIZE_ROWS, SEGMENT + 1).reshape(-1, SIZE_ROWS, SEGMENT + 1))

    @jax.jit
    def add(total: Params, carry: Carry, start: int, stop: int) -> tuple[Params, Carry]:
        def body(number: jax.Array, loop: tuple[Params, Carry]) -> tuple[Params, Carry]:
            total, carry = loop
            gradient, _, carry = _gradient(loss, params, pieces[number], carry)
            return jax.tree.map(lambda sum, each: sum + jnp.square(each), total, gradient), carry

        return jax.lax.fori_loop(start, stop, body, (total, carry))

    total, carry = jax.tree.map(jnp.zeros_like, params), initial_carry(config, SIZE_ROWS)
    for start in range(0, len(pieces), AT_ONCE):
        total, carry = add(total, carry, start, min(start + AT_ONCE, len(pieces)))
    return jax.tree.map(lambda sum: jnp.sqrt(sum / len(pieces)), total)


def make_reader(loss: LossFn) -> Callable[..., State]:
    """Compiles `read(params, sizes, adaptation, state, segments, start, stop)`, of several members at once.

    Adaptation and state have a leading axis of members; `params` are p_0 and `sizes` r of all; `segments [N, n + 1]`.
    """

    def read(
        params: Params, sizes: Params, adaptation: Adaptation, state: State, segments: jax.Array, start: int, stop: int
    ) -> State:
        mean = optax.tree.sum(sizes) / count_parameters(sizes)

        def move(now: jax.Array, trained: jax.Array, gradient: jax.Array, size: jax.Array) -> jax.Array:
            drawn_back = jnp.minimum(adaptation.decay * size / mean, 1) * (trained - now)
            return now - adaptation.rate * gradient / (size + EPSILON) + drawn_back

        def body(number: jax.Array, state: State) -> State:
            gradient, sums, carry = _gradient(loss, state.params, segments[number][None], state.carry)
            return State(jax.tree.map(move, state.params, params, gradient, sizes), carry, state.sums + sums)

        return jax.lax.fori_loop(start, stop, body, state)

    return jax.jit(jax.vmap(read, (None, None, 0, 0, None, None, None)), donate_argnums=3)


def read_text(
    reader: Callable[..., State],
    params: Params,
    sizes: Params,
    ids: np.ndarray,
    adaptation: Adaptation,
    config: NewLLMConfig,
) -> list[dict[str, float]]:
    """Loss, perplexity and accuracy of each member over a stream of ids, read as one row from its beginning."""
    members = len(adaptation.rate)
    segments = jnp.asarray(cut_stream(ids, 1, SEGMENT + 1))
    first = State(params, initial_carry(config, 1), Sums.zero())
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], members, 0), first)
    for start in range(0, len(segments), AT_ONCE):
        state = reader(params, sizes, adaptation, state, segments, start, min(start + AT_ONCE, len(segments)))
    sums = jax.device_get(state.sums)
    return [mean_metrics(Sums(*each)) for each in zip(sums.loss, sums.hits, sums.count, strict=True)]


def _gradient(loss: LossFn, params: Params, ids: jax.Array, carry: Carry) -> tuple[Params, Sums, Carry]:
    """The gradient of the mean loss of a segment in each row, its sums, and the carry after it."""

    def mean_loss(params: Params) -> tuple[jax.Array, tuple[Sums, Carry]]:
        sums, after = loss(params, ids, jnp.ones(len(ids), bool), None, carry)
        return sums.loss / jnp.maximum(sums.count, 1).astype(jnp.float32), (sums, after)

    gradient, (sums, after) = jax.grad(mean_loss, has_aux=True)(params)
    return gradient, sums, after
