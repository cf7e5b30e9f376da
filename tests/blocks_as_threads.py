"""GPU kernels of several thread blocks that wait for each other, on a CPU.

Pallas's interpreter runs one block after the other, so blocks that wait for each other would never end. Here a block is
a thread, in which the kernel's own Python runs operation by operation, on NumPy arrays that all blocks share. A thread
runs alone, and as far as it can: it hands over only where it polls the counter of its group, and, if asked, where it is
the last to arrive there. Memory begins as NaN. So a block that does not wait for another one reads NaN, every time; and
a wait that never ends is found.
"""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class Memory:
    """A reference as a kernel sees it, to a NumPy array that all blocks share."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, index: Any) -> jax.Array:
        return jnp.asarray(np.array(self.array[self._checked(index)]))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.array[self._checked(index)] = np.asarray(value)

    def _checked(self, index: Any) -> Any:
        """An index of NumPy, which would cut a slice short at the end and count from there what is negative."""
        found = plain(index)
        for size, each in zip(self.shape, found if isinstance(found, tuple) else (found,), strict=False):
            if not isinstance(each, slice):
                assert (np.asarray(each) >= 0).all() and (np.asarray(each) < size).all(), (each, size)
            elif each.start is not None:
                assert each.start >= 0 and each.stop <= size, (each, size)
        return found

    @property
    def at(self) -> Place:
        return Place(self)


class Place:
    """An element of `memory`, as `memory.at[index]` is."""

    def __init__(self, memory: Memory, index: Any = None) -> None:
        self.memory, self.index = memory, index

    def __getitem__(self, index: Any) -> Place:
        return Place(self.memory, index)


def plain(index: Any) -> Any:
    """An index of NumPy from one of Pallas."""
    if isinstance(index, tuple):
        return tuple(map(plain, index))
    if isinstance(index, slice):
        return index
    if getattr(index, "ndim", 0):
        return np.asarray(index)
    if hasattr(index, "start"):
        return slice(int(index.start), int(index.start) + index.size)
    return int(index)


class Blocks:
    """The thread blocks of a launch; `turn` is the one that runs. Those that have not begun begin last first.

    Attributes:
      group: whether of so many blocks that wait for each other the last to arrive lets the others go on first; 0: no.
    """

    def __init__(self, count: int, group: int) -> None:
        self.group = group
        self.turn, self.waiting, self.polls = count - 1, list(range(count)), 0
        self.changed, self.error = threading.Condition(), None

    def run(self, kernel: Any, memories: list[Memory]) -> None:
        threads = [threading.Thread(target=self._block, args=(n, kernel, memories)) for n in self.waiting]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error

    def _block(self, number: int, kernel: Any, memories: list[Memory]) -> None:
        try:
            self._wait_for_turn(number)
            kernel(*memories)
        except BaseException as error:
            self.error = self.error or error
        with self.changed:
            self.waiting.remove(number)
            self.polls = 0
            self._next(number)

    def _wait_for_turn(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == number or self.error)
            if self.error:
                raise RuntimeError("another block failed")

    def _next(self, number: int) -> None:
        self.turn = max((other for other in self.waiting if other < number), default=max(self.waiting, default=-1))
        self.changed.notify_all()

    def load(self, place: Place, volatile: bool = False, mask: Any = None, other: Any = None) -> jax.Array:
        """`plgpu.load` of some elements, or of a counter: then all others run first."""
        if mask is not None:
            index = tuple(np.where(mask, each, 0) if np.ndim(each) == np.ndim(mask) else each for each in place.index)
            return jnp.where(mask, place.memory[index], other)
        assert volatile  # or a GPU would read its own cache for ever
        self.polls += 1
        if self.polls > 2 * len(self.waiting):
            raise RuntimeError("all blocks wait")
        self._hand_over()
        return place.memory[place.index]

    def store(self, place: Place, value: Any, mask: Any) -> None:
        """`plgpu.store`: writes the elements where a mask is true."""
        value, mask = np.asarray(value), np.broadcast_to(mask, value.shape)
        place.memory[tuple(np.broadcast_to(each, value.shape)[mask] for each in place.index)] = value[mask]

    def atomic_add(self, memory: Memory, index: Any, value: Any) -> jax.Array:
        before = memory[index]
        memory[index] = before + value
        if self.group and int(memory[index]) % self.group == 0:
            self._hand_over()
        self.polls = 0
        return before

    def _hand_over(self) -> None:
        """Until all others have run."""
        number = self.turn
        with self.changed:
            self._next(number)
        self._wait_for_turn(number)


def fori_loop(start: int, stop: int, body: Any, carry: Any) -> Any:
    """`jax.lax.fori_loop`, step by step."""
    for step in range(start, stop):
        carry = body(jnp.int32(step), carry)
    return carry


def while_loop(condition: Any, body: Any, carry: Any) -> Any:
    """`jax.lax.while_loop`, step by step."""
    while condition(carry):
        carry = body(carry)
    return carry


def run_blocks_as_threads(monkeypatch: pytest.MonkeyPatch, group: int = 0) -> list[int]:
    """Replaces what of Pallas the kernels use, for a test; gives the numbers of blocks of the launches so far."""
    launches: list[int] = []

    def pallas_call(kernel, out_shape, grid, input_output_aliases, **_):
        def call(*inputs):
            given = [np.array(array) for array in inputs]
            aliased = {result: given[argument] for argument, result in input_output_aliases.items()}
            results = [aliased.get(i) for i in range(len(out_shape))]
            results = [
                np.full(shape.shape, np.nan, shape.dtype) if array is None else array
                for shape, array in zip(out_shape, results, strict=True)
            ]
            blocks = Blocks(int(np.prod(grid)), group)
            launches.append(len(blocks.waiting))
            with monkeypatch.context() as patch:
                patch.setattr(plgpu, "load", blocks.load)
                patch.setattr(plgpu, "store", blocks.store)
                patch.setattr(plgpu, "atomic_add", blocks.atomic_add)
                patch.setattr(plgpu, "debug_barrier", lambda: None)
                patch.setattr(pl, "program_id", lambda axis: jnp.int32(blocks.turn))
                patch.setattr(pl, "when", lambda condition: lambda body: body() if condition else None)
                patch.setattr(jax.lax, "fori_loop", fori_loop)
                patch.setattr(jax.lax, "while_loop", while_loop)
                blocks.run(kernel, [Memory(array) for array in (*given, *results)])
            return [jnp.asarray(array) for array in results]

        return call

    monkeypatch.setattr(pl, "pallas_call", pallas_call)
    return launches
