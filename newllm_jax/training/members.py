"""Several trainings of the same shapes side by side: one compiled program makes an update of all of them.

The members of such a program differ in numbers (a learning rate, dropout rates), seeds and initial parameters. What is
compiled is the program of one training under `jax.vmap`; on a GPU, where small products wait for each other more than
they compute, several members cost little more than one.

Members need not be at the same epoch: those that are behind go first, those that have finished are left out. So a
resumed sweep is the same as one that was never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from newllm_jax.config import RunConfig
from newllm_jax.errors import Stopped
from newllm_jax.training.gradient import LossFn
from newllm_jax.training.history import Entry, is_finished
from newllm_jax.training.loop import Pieces, Training, epoch_entry
from newllm_jax.training.losses import mean_metrics
from newllm_jax.training.mesh import ONE_DEVICE, DeviceMesh
from newllm_jax.training.place import Place
from newllm_jax.training.split import Split
from newllm_jax.training.step import EvalFn, Totals, TrainState, evaluation_of, updates_of
from newllm_jax.training.stopping import Stopping

if TYPE_CHECKING:
    from newllm_jax.training.checkpoint import Checkpoints


class Program(NamedTuple):
    """The compiled functions of some members: those of one training, of arrays with an axis of members (M) in front.

    Attributes:
      updates: (numbers, states, totals, data, orders `[M, steps, B]`, start, stop, keys `[M]`) -> states and totals;
        data and borders are common to all.
      evaluate: (parameters, data, order, stop, carry) -> sums; all but the parameters are common.
      mesh: the devices that share out the members, each of whom is on one device.
    """

    updates: Callable[..., tuple[TrainState, Totals]]
    evaluate: EvalFn
    mesh: DeviceMesh = ONE_DEVICE


class Watcher(Protocol):
    """Who watches the members of a program together."""

    def progress(self, epoch: int, done: int, steps: int) -> None:
        """After every piece: `done` of `steps` updates of `epoch`."""

    def epoch(self, epoch: int, seconds: float) -> None:
        """After every epoch of some members, whose histories have it by then."""


@dataclass
class Member:
    """One of the trainings.

    Attributes:
      name: for messages.
      config, training: as for `loop.fit`; only the schedules and the precision of `training` are used.
      numbers: what its updates take beside the state.
      checkpoints: its own.
      wrote: called with each entry of its history.
      state, history: where it stands.
      failure: why it cannot go on; "" where it can.
    """

    name: str
    config: RunConfig
    training: Training
    numbers: Any
    checkpoints: Checkpoints
    wrote: Callable[[Entry], None]
    state: TrainState
    history: list[Entry]
    failure: str = ""

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to train."""
        return bool(self.failure) or is_finished(self.history, self.config)


def make_program(
    step_fn: Callable[..., tuple[TrainState, Totals]], loss_fn: LossFn, mesh: DeviceMesh = ONE_DEVICE
) -> Program:
    """Compiles the functions of a program; states and totals are donated.

    Args:
      step_fn: (numbers, state, batch, present, key) -> as `step.StepFn`.
      loss_fn: of the evaluation.
      mesh: the number of members in a call must be a multiple of its devices.
    """

    def updates(numbers: Any, *arguments: Any) -> tuple[TrainState, Totals]:
        return updates_of(partial(step_fn, numbers))(*arguments)

    axes, evaluated = (0, 0, 0, None, 0, None, None, 0), (0, None, None, None, None)
    return Program(
        jax.jit(_by_member(updates, mesh, axes, (0, 0)), donate_argnums=(1, 2)),
        jax.jit(_by_member(evaluation_of(loss_fn), mesh, evaluated, 0)),
        mesh,
    )


def _by_member(
    function: Callable[..., Any], mesh: DeviceMesh, in_axes: tuple[int | None, ...], out_axes: Any
) -> Callable[..., Any]:
    """`jax.vmap` of a function, the members divided over the devices."""
    side_by_side = jax.vmap(function, in_axes)
    if mesh.is_single:
        return side_by_side
    return mesh.by_device(lambda place, *arguments: side_by_side(*arguments), in_axes, out_axes)


def fit_members(
    program: Program, members: Sequence[Member], splits: Mapping[str, Split], stopping: Stopping, watcher: Watcher
) -> None:
    """Trains every member to its end, or until its numbers are no longer finite, which ends that member alone.

    Args:
      members: of the same batch size, which train on the same `splits`: `train` and `validation`.

    Raises:
      InputError: no room for a checkpoint.
      Stopped: between two pieces or epochs, as `stopping` says. What was done of an epoch by then is lost.
    """
    room = 0  # how many members the program was last called with
    splits = {name: split.placed(program.mesh) for name, split in splits.items()}
    while unfinished := [member for member in members if not member.is_done]:
        epoch = 1 + min(len(member.history) for member in unfinished)
        turn = [member for member in unfinished if len(member.history) + 1 == epoch]
        # Another number of members is another program to compile: copies of one fill up for those that are missing.
        room = room if room / 2 < len(turn) <= room else program.mesh.round_up(len(turn))
        _train_epoch(program, turn, room, epoch, splits, stopping, watcher)
    for member in members:
        member.checkpoints.wait()


def _train_epoch(
    program: Program,
    turn: Sequence[Member],
    room: int,
    epoch: int,
    splits: Mapping[str, Split],
    stopping: Stopping,
    watcher: Watcher,
) -> None:
    """One epoch of some members, its validation and its checkpoints."""
    stopping.check("epoch", "checkpoint")
    train, validation, config = splits["train"], splits["validation"], turn[0].config
    places = [Place.start(epoch, member.state) for member in turn]
    begun, steps = time.monotonic(), train.steps(config.batch_size)
    places = _run_epoch(program, turn, room, places, train, stopping, watcher)
    seconds = time.monotonic() - begun

    batch_size = min(config.examples_at_once, validation.room)
    evaluated = _stack([place.state.evaluated for place in places], room)
    order, batches = validation.in_order(batch_size), validation.steps(batch_size)
    sums = jax.device_get(program.evaluate(evaluated, validation.data, order, batches, validation.carry))
    whole = time.monotonic() - begun
    for number, (member, place) in enumerate(zip(turn, places, strict=True)):
        validated = mean_metrics(jax.tree.map(lambda leaf, number=number: leaf[number], sums))
        place = dataclasses.replace(place, done=steps, seconds=seconds)
        totals: Totals = jax.device_get(place.totals)
        finite = [totals.sums.loss, totals.grad_norm, validated["loss"]]
        if not totals.sums.count or not all(map(math.isfinite, finite)):
            member.failure = f"epoch {epoch}: the loss or a gradient is not finite"
            continue
        member.state = place.state
        member.history.append(epoch_entry(member.training, place, steps, validated, whole))
        member.wrote(member.history[-1])
    stopping.took("epoch", whole)
    watcher.epoch(epoch, whole)
    with stopping.timed("checkpoint"):
        for member in turn:
            if not member.failure:
                record = {"seconds": stopping.clock.seconds()}
                member.checkpoints.save(epoch, member.state, member.history, record)
        if config.time_limit:  # to know how long it takes until all are whole
            for member in turn:
                member.checkpoints.wait()


def _run_epoch(
    program: Program,
    turn: Sequence[Member],
    room: int,
    places: Sequence[Place],
    train: Split,
    stopping: Stopping,
    watcher: Watcher,
) -> list[Place]:
    """The updates of an epoch, in pieces of about a second: the places of the members after it."""
    epoch, steps = places[0].epoch, train.steps(turn[0].config.batch_size)
    orders = [train.shuffled(member.config.batch_size, member.config.seed, epoch) for member in turn]
    keys = [jax.random.fold_in(jax.random.key(member.config.seed), epoch) for member in turn]
    numbers, orders, keys = (_stack(each, room) for each in ([member.numbers for member in turn], orders, keys))
    states = _stack([place.state for place in places], room)
    totals = _stack([place.totals for place in places], room)
    pieces, done = Pieces(steps), 0
    while done < steps:
        started, stop = time.monotonic(), min(done + pieces.size, steps)
        states, totals = program.updates(numbers, states, totals, train.data, orders, done, stop, keys)
        jax.block_until_ready(totals)
        pieces.learn(time.monotonic() - started)
        done = stop
        watcher.progress(epoch, done, steps)
        stopping.took("piece", pieces.elapsed)
        if done < steps and (reason := stopping.reason("piece")):
            raise Stopped(reason)
    return [
        dataclasses.replace(place, state=state, totals=each)
        for place, (state, each) in zip(places, _unstack((states, totals), len(turn)), strict=True)
    ]


def _stack(trees: Sequence[Any], room: int) -> Any:
    """Trees of arrays as one, with an axis of members in front; the first one fills up to `room`."""
    # Array by array: a program for all of them at once would take longer to compile than an epoch takes.
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees, *[trees[0]] * (room - len(trees)))


def _unstack(tree: Any, count: int) -> list[Any]:
    """The first trees of a stacked one."""
    return [jax.tree.map(lambda leaf, number=number: leaf[number], tree) for number in range(count)]
