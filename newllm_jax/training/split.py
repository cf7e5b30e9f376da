"""The examples of a split, on the device or in files, and the order in which a training reads them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.training.mesh import DeviceMesh

Data: TypeAlias = Any  # a tree of arrays [examples, ...]; a batch of it is a tree of [B, ...]
Carry: TypeAlias = Any  # what a loss hands from one batch to the next, a tree of arrays; None where it hands nothing


@dataclass(frozen=True)
class Split:
    """Examples, read in batches: independent ones, or the pieces of a stream, whose batches hand a carry on.

    Attributes:
      data: a tree of arrays with a leading axis of examples. They may have room for more than there are: trainings on
        fewer and fewer examples then share compiled programs.
      examples: how many there are.
      rows: of a stream, which is read in order, so many examples at a time; None for independent examples.
      carry: what the loss gets with the first batch; None for independent examples.
      in_files: whether `data` are NumPy arrays, mapped from files, that are read piece by piece (`training.feed`).
    """

    data: Data
    examples: int
    rows: int | None = None
    carry: Carry = None
    in_files: bool = False

    @classmethod
    def from_arrays(cls, arrays: Data, rows: int | None = None, carry: Carry = None) -> Split:
        """All examples of some arrays, moved to the device."""
        data = jax.tree.map(jnp.asarray, arrays)
        return cls(data, jax.tree.leaves(data)[0].shape[0], rows, carry)

    @classmethod
    def from_file(cls, arrays: Data) -> Split:
        """All examples of some NumPy arrays `[examples, ...]`, as a rule mapped from files, which stay where they are.

        They are independent, and batches of them are the same as of `from_arrays`.
        """
        return cls(arrays, len(jax.tree.leaves(arrays)[0]), in_files=True)

    def placed(self, mesh: DeviceMesh) -> Split:
        """With the examples on every device of a grid; those in files stay there."""
        data = self.data if self.in_files else mesh.place(self.data)
        return dataclasses.replace(self, data=data, carry=mesh.place_examples(self.carry))

    @property
    def room(self) -> int:
        """How many examples the arrays have room for."""
        return jax.tree.leaves(self.data)[0].shape[0]

    def steps(self, batch_size: int) -> int:
        """How many batches all examples are; the last may be smaller."""
        return -(-self.examples // (self.rows or batch_size))

    def shuffled(self, batch_size: int, seed: int, epoch: int) -> jax.Array:
        """The batches of an epoch (from 1), see `batches`; those of a stream stay in order."""
        if self.rows:
            return self.in_order(batch_size)
        return jnp.asarray(batches(epoch_order(seed, epoch, self.examples), batch_size, self.room))

    def in_order(self, batch_size: int) -> jax.Array:
        """The batches without shuffling."""
        return jnp.asarray(batches(np.arange(self.examples, dtype=np.int32), self.rows or batch_size, self.room))


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The shuffled order of the examples `[examples]`: a pure function of the seed and the epoch (from 1)."""
    return np.random.default_rng((seed, epoch)).permutation(np.arange(examples, dtype=np.int32))


def batches(order: np.ndarray, batch_size: int, capacity: int = 0) -> np.ndarray:
    """Cuts an order of examples into batches `[steps, B]`; -1 fills the places that are empty.

    With a `capacity` there are as many batches as that many examples would need.
    """
    steps = -(-max(len(order), capacity) // batch_size)
    padded = np.full(steps * batch_size, -1, np.int32)
    padded[: len(order)] = order
    return padded.reshape(steps, batch_size)


@flax.struct.dataclass
class Row:
    """A batch among batches `[batches, B, ...]`: its number, and which of its examples are present, bool `[B]`."""

    number: jax.Array | int
    present: jax.Array


def take(data: Data, indices: jax.Array | Row) -> tuple[Data, jax.Array]:
    """The batch of these examples, and which of them are present: an index of -1 gives some example, marked absent."""
    if isinstance(indices, Row):
        return jax.tree.map(lambda array: array[indices.number], data), indices.present
    return jax.tree.map(lambda array: array[jnp.maximum(indices, 0)], data), indices >= 0
