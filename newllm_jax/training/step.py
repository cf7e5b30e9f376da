"""The update loop: pure functions of a TrainState, many updates in one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.training.loss_scale import LossScale, next_loss_scale, unscale

Params: TypeAlias = Any  # a tree of arrays
Data: TypeAlias = Any  # a tree of arrays [examples, ...]; a batch of it is a tree of [batch, ...]


@flax.struct.dataclass
class TrainState:
    """All that an update changes; with the epoch's number, all that resuming needs.

    Attributes:
      params: the trained parameters.
      opt_state: of the Optax optimiser, its counts of updates included.
      loss_scale: in fp16; None in the other precisions.
    """

    params: Params
    opt_state: optax.OptState
    loss_scale: LossScale | None = None


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


# (params, batch, present [batch] bool, dropout key or None) -> sums over the targets of the examples that are present
LossFn: TypeAlias = Callable[[Params, Data, jax.Array, jax.Array | None], Sums]
# (state, batch, present, key) -> the state after one update, and what it adds to the epoch's totals
StepFn: TypeAlias = Callable[[TrainState, Data, jax.Array, jax.Array], tuple[TrainState, "Totals"]]
UpdateFn: TypeAlias = Callable[..., tuple[TrainState, "Totals"]]
EvalFn: TypeAlias = Callable[[Params, Data, jax.Array, int], Sums]


@flax.struct.dataclass
class Totals:
    """What an epoch adds up: the sums of its losses and, for its mean, the gradient norms before clipping."""

    sums: Sums
    grad_norm: jax.Array

    @classmethod
    def zero(cls) -> Totals:
        """Nothing added yet."""
        return cls(Sums.zero(), jnp.zeros(()))


def init_state(
    params: Params, optimizer: optax.GradientTransformation, loss_scale: LossScale | None = None
) -> TrainState:
    """The state before the first update."""
    return TrainState(params, jax.jit(optimizer.init)(params), loss_scale)


def batches(order: np.ndarray, batch_size: int, capacity: int = 0) -> np.ndarray:
    """Cuts an order of examples into batches `[steps, batch_size]`; -1 fills the places that are empty.

    With a `capacity` there are as many batches as that many examples would need.
    """
    steps = -(-max(len(order), capacity) // batch_size)
    padded = np.full(steps * batch_size, -1, np.int32)
    padded[: len(order)] = order
    return padded.reshape(steps, batch_size)


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The shuffled order of the examples `[examples]`: a pure function of the seed and the epoch (from 1)."""
    return np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)


def take(data: Data, indices: jax.Array) -> tuple[Data, jax.Array]:
    """The batch of these examples, and which of them are present: an index of -1 gives some example, marked absent."""
    return jax.tree.map(lambda array: array[jnp.maximum(indices, 0)], data), indices >= 0


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Data,
    present: jax.Array,
    key: jax.Array,
) -> tuple[TrainState, Totals]:
    """One update on the mean loss over the targets of a batch; one without targets has a gradient of 0."""
    scale = state.loss_scale

    def mean_loss(params: Params) -> tuple[jax.Array, Sums]:
        sums = loss_fn(params, batch, present, key)
        mean = sums.loss / jnp.maximum(sums.count, 1).astype(jnp.float32)
        return mean if scale is None else mean * scale.value, sums

    grads, sums = jax.grad(mean_loss, has_aux=True)(state.params)
    if scale is not None:
        grads = unscale(grads, scale)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    after, totals = TrainState(params, opt_state), Totals(sums, optax.tree.norm(grads))
    return (after, totals) if scale is None else _unless_overflown(state, scale, after, totals)


def _unless_overflown(
    state: TrainState, scale: LossScale, after: TrainState, totals: Totals
) -> tuple[TrainState, Totals]:
    """The state after an update with a loss scale, or the one before where the update is skipped.

    A skipped update adds no gradient norm, and its loss only where that is finite.
    """
    lost = ~jnp.isfinite(totals.sums.loss)
    scale, skip = next_loss_scale(scale, jnp.isfinite(totals.grad_norm) & ~lost)

    def choose(where: jax.Array, one: Any, other: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(where, a, b), one, other)

    params, opt_state = choose(skip, (state.params, state.opt_state), (after.params, after.opt_state))
    sums = choose(skip & lost, Sums.zero(), totals.sums)
    return TrainState(params, opt_state, scale), Totals(sums, jnp.where(skip, 0, totals.grad_norm))


def make_updates(step_fn: StepFn) -> UpdateFn:
    """Compiles `updates(state, totals, data, order, start, stop, key)`: updates start..stop of an epoch in one call.

    `step_fn` is one update: `train_step` with its first two arguments given, or what does the same.
    `order [steps, batch]` and `key` are the whole epoch's; update i draws its dropout from `fold_in(key, i)`, and the
    borders are traced, so any cut of an epoch into calls runs the same program and gives the same bits. State and
    totals are donated.
    """

    def updates(
        state: TrainState, totals: Totals, data: Data, order: jax.Array, start: int, stop: int, key: jax.Array
    ) -> tuple[TrainState, Totals]:
        def body(step: jax.Array, carry: tuple[TrainState, Totals]) -> tuple[TrainState, Totals]:
            state, totals = carry
            batch, present = take(data, order[step])
            state, added = step_fn(state, batch, present, jax.random.fold_in(key, step))
            return state, jax.tree.map(jnp.add, totals, added)

        return jax.lax.fori_loop(start, stop, body, (state, totals))

    return jax.jit(updates, donate_argnums=(0, 1))


def make_evaluation(loss_fn: LossFn) -> EvalFn:
    """Compiles `evaluate(params, data, order, stop) -> Sums` over the first `stop` batches of `order [steps, batch]`.

    There is no dropout.
    """

    def evaluate(params: Params, data: Data, order: jax.Array, stop: int) -> Sums:
        def body(step: jax.Array, sums: Sums) -> Sums:
            batch, present = take(data, order[step])
            return sums + loss_fn(params, batch, present, None)

        return jax.lax.fori_loop(0, stop, body, Sums.zero())

    return jax.jit(evaluate)
