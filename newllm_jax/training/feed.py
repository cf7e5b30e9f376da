"""What the updates of an epoch read: a split on the device as a whole, or blocks that Grain reads from files.

A block is the batches of `capacity` updates, as many as fit into `BLOCK_BYTES`. While one is computed, a thread moves
the next one to the device, and Grain's threads read the batches after it. Blocks of every size give the updates the
same examples in the same places, so the results are bit for bit those of a split on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias, TypeVar

import flax.struct
import jax
import numpy as np

from newllm_jax.config import Examples
from newllm_jax.processes import process_place
from newllm_jax.training import split as splits
from newllm_jax.training.losses import Sums
from newllm_jax.training.memory import device_memory
from newllm_jax.training.mesh import ONE_DEVICE, DeviceMesh
from newllm_jax.training.split import Data, Split
from newllm_jax.training.step import EvalFn, Params

Order: TypeAlias = (
    Any  # int32: `order[step]` is `[B]`, the places of a batch in the data; -1 where an example is absent
)

BLOCK_BYTES = 2**26  # of the examples of a block
SMALL_SHARE = 1 / 16  # of the free memory of the device: a split up to that size is moved there as a whole
READ_THREADS, READ_AHEAD = 8, 32  # of Grain: threads, and batches that wait to be moved


@dataclass(frozen=True)
class Share:
    """Which part of each batch a process reads: part `index` of `count` contiguous parts, as equal as they can be."""

    index: int = 0
    count: int = 1

    def places(self, batch_size: int) -> range:
        """Of the examples in a batch that are this part."""
        return range(batch_size * self.index // self.count, batch_size * (self.index + 1) // self.count)


WHOLE = Share()


@flax.struct.dataclass
class BlockOrder:
    """The order of a block: `order[step]` is the batch of update `step` of the epoch, for the updates of the block.

    Attributes:
      batches: `[capacity, B]`, update `step` in row `step % capacity`; or twice that row where the capacity is 1 and an
        epoch has more updates. XLA would leave out the choice of an only row, and round other sums in the same kernel
        otherwise. Nothing here grows with the epoch.
    """

    batches: Any

    def __getitem__(self, step: jax.Array | int) -> jax.Array:
        return self.batches[step % len(self.batches)]


@flax.struct.dataclass
class SharedOrder:
    """The order of a block `[capacity, B, ...]` whose examples are divided over the devices of a grid.

    Attributes:
      present: bool `[capacity, B]`.
    """

    present: Any

    def __getitem__(self, step: jax.Array | int) -> splits.Row:
        number = step % len(self.present)
        return splits.Row(number, self.present[number])


class Feed(Protocol):
    """Gives the data of updates, and their order, as the compiled `updates` take them."""

    def border(self, done: int) -> int:
        """Up to which update the data last that `block(done)` gives."""
        ...

    def block(self, done: int) -> tuple[Data, Order]:
        """The data of the updates from `done` on, up to the border."""
        ...


@dataclass(frozen=True)
class DeviceFeed:
    """All batches of an epoch, on the device: data `[examples, ...]`, order `[steps, B]`."""

    data: Data
    order: jax.Array

    def border(self, done: int) -> int:
        return len(self.order)

    def block(self, done: int) -> tuple[Data, Order]:
        return self.data, self.order


class FileFeed:
    """Blocks of the batches of an epoch, out of arrays in files; a context, at whose end the reading ends.

    Blocks are asked for in their order; the first may be asked for from its middle on, where an epoch is resumed. Its
    earlier batches are not read, and are zeros.
    """

    def __init__(
        self,
        data: Data,
        order: np.ndarray | range,
        batch_size: int,
        start: int = 0,
        share: Share = WHOLE,
        mesh: DeviceMesh = ONE_DEVICE,
    ) -> None:
        """Begins to read.

        Args:
          data: a tree of NumPy arrays `[examples, ...]`.
          order: of the examples of the epoch.
          start: the first update that will be asked for.
          share: which part of each batch is read. The blocks are those of the part alone: with b examples of a batch in
            it, data `[capacity * b, ...]`, and an order `[capacity, b]` of places in these.
          mesh: of several devices, over which the examples of each batch are divided.
        """
        self._mesh = mesh
        self.steps = -(-len(order) // batch_size)
        self.capacity = block_capacity(data, batch_size, len(order))
        self._batches = BatchSource(data, order, batch_size, share)
        self._reader = read_batches(self._batches, start, self.capacity)
        self._thread = ThreadPoolExecutor(1, "block")
        self._number, self._block = -1, (None, None)
        self._next: Future[tuple[Data, Order]] = self._thread.submit(self._load, start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        close = getattr(self._reader, "close", None)  # Grain's threads; some versions end them when nobody reads
        if close:
            close()

    def border(self, done: int) -> int:
        return min((done // self.capacity + 1) * self.capacity, self.steps)

    def block(self, done: int) -> tuple[Data, Order]:
        if done // self.capacity != self._number:
            self._block = (None, None)  # so that the memory of the one before is free
            self._number, self._block = done // self.capacity, self._next.result()
            if self.border(done) < self.steps:
                self._next = self._thread.submit(self._load, self.border(done))
        return self._block

    def _load(self, first: int) -> tuple[Data, Order]:
        """The block of the updates from `first` on, on the device."""
        width, begin = len(self._batches.places), first // self.capacity * self.capacity
        # Never one buffer twice: on a CPU the arrays of the device are these.
        rows = jax.tree.map(
            lambda array: np.zeros((self.capacity * width, *array.shape[1:]), array.dtype), self._batches.data
        )
        order = np.full((self.capacity, width), -1, np.int32)
        twice = min(2, self.steps) if self.capacity == 1 else 1  # see BlockOrder
        for number in range(first - begin, self.border(first) - begin):
            batch, place = next(self._reader), number * width
            count = len(jax.tree.leaves(batch)[0])
            for block, part in zip(jax.tree.leaves(rows), jax.tree.leaves(batch), strict=True):
                block[place : place + count] = part
            order[number, :count] = np.arange(place, place + count)
        if self._mesh.is_single:
            return to_device((rows, BlockOrder(np.concatenate([order] * twice))))
        rows = jax.tree.map(lambda array: array.reshape(self.capacity, width, *array.shape[1:]), rows)
        return self._mesh.place_batches((rows, SharedOrder(order >= 0)))


@dataclass(frozen=True)
class BatchSource:
    """What Grain reads from: a part of each batch of an epoch, by the number of its update."""

    data: Data
    order: np.ndarray | range
    batch_size: int
    share: Share = WHOLE

    @property
    def places(self) -> range:
        """Of the part in a batch."""
        return self.share.places(self.batch_size)

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index: int) -> Data:
        """The examples of the part that are there, `[b, ...]`; the last batch may have fewer than the others."""
        first = index * self.batch_size
        chosen = np.asarray(self.order[first + self.places.start : first + self.places.stop], np.intp)
        return jax.tree.map(lambda array: np.take(array, chosen, axis=0), self.data)


Block = TypeVar("Block")


def to_device(block: Block) -> Block:
    """A tree of NumPy arrays, moved to the default device; the one place where blocks go there."""
    return jax.device_put(block)


def read_batches(source: BatchSource, start: int, capacity: int) -> Iterator[Data]:
    """The elements of a source from `start` on, in order; Grain's threads read up to a quarter of a block ahead."""
    if start >= len(source):
        return iter(())
    import grain  # takes a second, and only data in files need it

    ahead = min(max(capacity // 4, 1), READ_AHEAD)
    options = grain.ReadOptions(num_threads=min(ahead, READ_THREADS), prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(source)[start:].to_iter_dataset(options))


def block_capacity(data: Data, batch_size: int, examples: int) -> int:
    """The updates whose batches are one block, at least one and at most those of an epoch of so many examples."""
    example = sum(leaf.dtype.itemsize * math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(data))
    steps = -(-examples // batch_size)
    return max(1, min(BLOCK_BYTES // max(example * batch_size, 1), steps))


def open_feed(
    split: Split, batch_size: int, seed: int, epoch: int, start: int = 0, mesh: DeviceMesh = ONE_DEVICE
) -> AbstractContextManager[Feed]:
    """The feed of an epoch (from 1) in its shuffled order, a context.

    Args:
      start: the first update that will be asked for.
      mesh: over which the examples of each batch are divided; each process reads those of its own devices.
    """
    if not split.in_files:
        return nullcontext(DeviceFeed(split.data, mesh.place(split.shuffled(batch_size, seed, epoch))))
    order = splits.epoch_order(seed, epoch, split.examples)
    return FileFeed(split.data, order, batch_size, start, Share(*process_place()), mesh)


def evaluate_in_blocks(
    evaluation: EvalFn, params: Params, split: Split, batch_size: int, mesh: DeviceMesh = ONE_DEVICE
) -> Sums:
    """The sums over a split in files: those of one batch after another, added in the order of a split on the device."""
    if not mesh.is_single:
        return _evaluate_on_grid(evaluation, params, split, batch_size, mesh)
    sums, rows = Sums.zero(), np.zeros(min(2, split.steps(batch_size)), np.int32)  # one or several, see BlockOrder
    with FileFeed(split.data, range(split.examples), batch_size) as feed:
        for first in range(0, feed.steps, feed.capacity):
            data, order = feed.block(first)
            for step in range(first, feed.border(first)):
                sums = _add(sums, evaluation(params, data, order[step - first + rows], 1, None))
            jax.block_until_ready(sums)  # or blocks would wait on the device for their turn
    return sums


def _evaluate_on_grid(evaluation: EvalFn, params: Params, split: Split, batch_size: int, mesh: DeviceMesh) -> Sums:
    sums, params = mesh.place(Sums.zero()), mesh.place_parameters(params)
    with FileFeed(split.data, range(split.examples), batch_size, 0, Share(*process_place()), mesh) as feed:
        for first in range(0, feed.steps, feed.capacity):
            sums = _add(sums, evaluation(params, *feed.block(first), feed.border(first) - first, None))
            jax.block_until_ready(sums)
    return sums


_add: Callable[[Sums, Sums], Sums] = jax.jit(lambda sums, added: sums + added)


def stays_in_files(examples: Examples, size: int) -> bool:
    """Whether a split of so many bytes is read from files, as the setting says.

    `auto`: where it is larger than `SMALL_SHARE` of the memory that the device has free now; not where that is unknown.
    """
    if examples != "auto":
        return examples == "files"
    _, free = device_memory()
    return free is not None and size > SMALL_SHARE * free


def make_split(arrays: Data, examples: Examples) -> Split:
    """A split of independent examples, NumPy arrays `[examples, ...]`, where the setting says."""
    return Split.from_file(arrays) if stays_in_files(examples, _bytes(arrays)) else Split.from_arrays(arrays)


@dataclass(frozen=True)
class Held:
    """What the device holds of a split, for a plan of the memory.

    Attributes:
      data: the shapes that an update is compiled for, a tree.
      updates: how many its order is of.
      copies: how many such data are there at a time: of a split in files two blocks.
    """

    data: Data
    updates: int
    copies: int

    @property
    def data_bytes(self) -> int:
        """Of the data that an update reads."""
        return _bytes(self.data)

    @property
    def size(self) -> int:
        """Bytes of all that is there at a time."""
        return self.copies * self.data_bytes


def held(arrays: Data, examples: Examples, batch_size: int) -> Held:
    """What the device would hold of `make_split`. Shapes `[examples, ...]` will do for the arrays."""
    count = jax.tree.leaves(arrays)[0].shape[0]
    rows, updates, copies = count, -(-count // batch_size), 1
    if stays_in_files(examples, _bytes(arrays)):
        updates, copies = block_capacity(arrays, batch_size, count), 2
        rows = updates * batch_size
    data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), arrays)
    return Held(data, updates, copies)


def _bytes(arrays: Data) -> int:
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(arrays))
