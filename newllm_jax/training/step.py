"""The update loop: pure functions of a TrainState, many updates in one compiled call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import optax

from newllm_jax.training.average import Average
from newllm_jax.training.gradient import LossFn, Params, Point, batch_gradient
from newllm_jax.training.loss_scale import LossScale, next_loss_scale, unscale
from newllm_jax.training.losses import Sums
from newllm_jax.training.mesh import ONE_DEVICE, DeviceMesh
from newllm_jax.training.split import Carry, Data, take


@flax.struct.dataclass
class TrainState:
    """All that an update changes; with the epoch's number, all that resuming needs.

    Attributes:
      params: the trained parameters.
      opt_state: of the Optax optimiser, its counts of updates included.
      loss_scale: in fp16; None in the other precisions.
      carry: what the loss returned beside its sums after the last batch, in a dict or tuple, for Orbax saves no bare
        array; None where it returns nothing.
      ema: a moving average of the parameters; None where the training has none.
    """

    params: Params
    opt_state: optax.OptState
    loss_scale: LossScale | None = None
    carry: Carry = None
    ema: Average | None = None

    @property
    def evaluated(self) -> Params:
        """The parameters that validation measures: their average where there is one."""
        return self.params if self.ema is None else self.ema.params


# (state, batch, present, key) -> the state after one update, and what it adds to the epoch's totals
StepFn: TypeAlias = Callable[[TrainState, Data, jax.Array, jax.Array], tuple[TrainState, "Totals"]]
UpdateFn: TypeAlias = Callable[..., tuple[TrainState, "Totals"]]
EvalFn: TypeAlias = Callable[..., Sums]


@flax.struct.dataclass
class Totals:
    """What an epoch adds up.

    Attributes:
      sums: of its losses.
      grad_norm: for its mean, the gradient norms before clipping.
      finite_losses, finite_gradients: how many updates there were before the first one whose loss, and whose gradient,
        was not finite. Of a single update they are not counted.
    """

    sums: Sums
    grad_norm: jax.Array
    finite_losses: jax.Array | int = 0
    finite_gradients: jax.Array | int = 0

    @classmethod
    def zero(cls) -> Totals:
        """Nothing added yet."""
        return cls(Sums.zero(), jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def add(self, update: Totals) -> Totals:
        """With the totals of one more update. A sum that is not finite stays so, and its count stands still."""
        sums, grad_norm = self.sums + update.sums, self.grad_norm + update.grad_norm
        return Totals(
            sums,
            grad_norm,
            self.finite_losses + jnp.isfinite(sums.loss),
            self.finite_gradients + jnp.isfinite(grad_norm),
        )


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    loss_scale: LossScale | None = None,
    averaged: bool = False,
    carry: Carry = None,
    mesh: DeviceMesh = ONE_DEVICE,
) -> TrainState:
    """The state before the first update, on the devices of a grid.

    Args:
      carry: what the loss gets with the first batch of an epoch.
      averaged: whether a moving average of the parameters is kept; see `train_step`.
    """
    params = mesh.place_parameters(params)
    ema = jax.jit(Average.start)(params) if averaged else None
    opt_state = jax.jit(lambda params: mesh.divide(optimizer.init(params)))(params)
    return TrainState(params, opt_state, loss_scale, carry, ema)


def count_parameters(params: Params) -> int:
    """How many numbers a parameter tree (or its shapes) holds; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Data,
    present: jax.Array,
    key: jax.Array,
    micro_batch: int | None = None,
    ema_decay: float | jax.Array = 0.0,
    mesh: DeviceMesh = ONE_DEVICE,
) -> tuple[TrainState, Totals]:
    """One update on the mean loss over the targets of a batch; one without targets has a gradient of 0.

    Args:
      micro_batch: examples computed at a time, their gradients added up; None: all of them. Less memory, and the same
        update but for rounding.
      ema_decay: of the moving average, where the state has one.
      mesh: the devices that share out the examples, those of a micro batch too.

    Raises:
      InputError: a `micro_batch` for a loss with a carry.
    """
    scale = state.loss_scale
    at = Point(state.params, scale, state.carry)
    grads, sums, carry = batch_gradient(loss_fn, at, batch, present, key, micro_batch or len(present), mesh)
    grads = mesh.divide(grads)
    if scale is not None:
        grads = unscale(grads, scale)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema and state.ema.update(params, ema_decay)
    after = dataclasses.replace(state, params=params, opt_state=opt_state, carry=carry, ema=ema)
    totals = Totals(sums, optax.tree.norm(grads))
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

    carry = choose(lost, state.carry, after.carry)  # of the batch, whatever became of its gradient
    after = dataclasses.replace(choose(skip, state, after), loss_scale=scale, carry=carry)
    sums = choose(skip & lost, Sums.zero(), totals.sums)
    return after, Totals(sums, jnp.where(skip, 0, totals.grad_norm))


def make_updates(step_fn: StepFn, mesh: DeviceMesh = ONE_DEVICE) -> UpdateFn:
    """Compiles `updates_of` an update. State and totals are donated."""
    return make_frozen_updates(lambda frozen: step_fn, None, mesh)


def make_frozen_updates(
    step_of: Callable[[Params], StepFn], frozen: Params, mesh: DeviceMesh = ONE_DEVICE
) -> UpdateFn:  # fmt: skip
    """`make_updates` for a step that also reads frozen parameters, an argument of the compiled call.

    Args:
      step_of: (frozen parameters) -> one update.
    """

    def updates(frozen: Params, *arguments: Any) -> tuple[TrainState, Totals]:
        return updates_of(step_of(frozen), mesh)(*arguments)

    def place(state: TrainState, totals: Totals, *others: Any) -> tuple[Any, ...]:
        return place_state(mesh, state), *mesh.place((totals, *others))

    return _Compiled(jax.jit(updates, donate_argnums=(1, 2)), mesh.place_parameters(frozen), place)


def make_evaluation(loss_fn: LossFn, mesh: DeviceMesh = ONE_DEVICE) -> EvalFn:
    """Compiles `evaluation_of` a loss."""
    return make_frozen_evaluation(lambda frozen: loss_fn, None, mesh)


def make_frozen_evaluation(
    loss_of: Callable[[Params], LossFn], frozen: Params, mesh: DeviceMesh = ONE_DEVICE
) -> EvalFn:  # fmt: skip
    """`make_evaluation` of a loss that also reads frozen parameters, an argument of the compiled call."""

    def evaluate(frozen: Params, *arguments: Any) -> Sums:
        return evaluation_of(loss_of(frozen), mesh)(*arguments)

    def place(params: Params, *others: Any) -> tuple[Any, ...]:
        return mesh.place_parameters(params), *mesh.place(others)

    return _Compiled(jax.jit(evaluate), mesh.place_parameters(frozen), place)


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A compiled function, its first argument, and where on the devices the others lie."""

    function: Any
    first: Params
    place: Callable[..., tuple[Any, ...]]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(self.first, *self.place(*arguments))

    def lower(self, *arguments: Any) -> Any:
        """The program for arguments of these shapes."""
        return self.function.lower(self.first, *self.place(*arguments))

    def compile(self, *arguments: Any) -> _Compiled:
        """Compiled for arguments of these shapes only."""
        return dataclasses.replace(self, function=self.lower(*arguments).compile())


def place_state(mesh: DeviceMesh, state: TrainState) -> TrainState:
    """Moves a state to where its parts lie: parameters, moments and average divided, the carry by its examples."""
    carry = mesh.place_examples(state.carry)
    return dataclasses.replace(mesh.place_parameters(dataclasses.replace(state, carry=None)), carry=carry)


def updates_of(step_fn: StepFn, mesh: DeviceMesh = ONE_DEVICE) -> UpdateFn:
    """`updates(state, totals, data, order, start, stop, key)`: updates start..stop of an epoch in one call.

    `step_fn` is one update: `train_step` with its first two arguments bound, or a function that does the same.
    `order [steps, B]` and `key` are the whole epoch's; update i draws its dropout from `fold_in(key, i)`, and the
    borders are traced, so any cut of an epoch into calls runs the same program and gives the same bits.
    """

    def updates(
        state: TrainState, totals: Totals, data: Data, order: jax.Array, start: int, stop: int, key: jax.Array
    ) -> tuple[TrainState, Totals]:
        def body(step: jax.Array, loop: tuple[TrainState, Totals]) -> tuple[TrainState, Totals]:
            state, totals = loop
            batch, present = mesh.share(take(data, order[step]))
            state, added = step_fn(state, batch, present, jax.random.fold_in(key, step))
            carry = mesh.share(state.carry)
            state = dataclasses.replace(mesh.divide(dataclasses.replace(state, carry=None)), carry=carry)
            return state, mesh.repeat(totals.add(added))

        return jax.lax.fori_loop(start, stop, body, (state, totals))

    return updates


def evaluation_of(loss_fn: LossFn, mesh: DeviceMesh = ONE_DEVICE) -> EvalFn:
    """`evaluate(params, data, order, stop, carry=None) -> Sums` over the first `stop` batches of an order.

    `order` is `[steps, B]`, `carry` what the loss gets with the first batch. There is no dropout.
    """

    def evaluate(params: Params, data: Data, order: jax.Array, stop: int, carry: Carry = None) -> Sums:
        def body(step: jax.Array, loop: tuple[Sums, Carry]) -> tuple[Sums, Carry]:
            sums, carry = loop
            batch, present = mesh.share(take(data, order[step]))
            added, carry = loss_fn(params, batch, present, None, carry)
            return mesh.repeat(sums + added), mesh.share(carry)

        return jax.lax.fori_loop(0, stop, body, (Sums.zero(), carry))[0]

    return evaluate
