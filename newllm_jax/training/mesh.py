"""The devices of a training as a grid, and which part of every array lies on which device.

A grid has two axes, `data` and `fsdp`; JAX and XLA do the rest (one program, its arrays divided over the grid):

    examples of a batch        divided over all devices of the grid
    parameters, moments        divided over `fsdp` (fully sharded data parallel: Rajbhandari et al. 2020), the same
                               along `data`
    data sets, orders, sums    the same on every device

What is computed does not depend on the grid: a batch has the same examples and dropout masks on any number of devices,
and losses differ by rounding only. On a grid of one device nothing here does anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from newllm_jax.config import check
from newllm_jax.errors import InputError
from newllm_jax.processes import are_several, host_copies

AXES = ("data", "fsdp")
SMALLEST_DIVIDED = 2**12  # numbers; smaller arrays are the same on every device, for a message costs more than they do


@dataclass(frozen=True)
class DeviceMesh:
    """A grid of `data` by `fsdp` devices; the first ones that JAX lists."""

    data: int = 1
    fsdp: int = 1

    @property
    def size(self) -> int:
        """How many devices it has."""
        return self.data * self.fsdp

    @property
    def is_single(self) -> bool:
        """Whether it is one device, on which arrays lie as JAX puts them."""
        return self.size == 1

    @property
    def grid(self) -> Mesh:
        """As JAX has it."""
        return Mesh(np.array(jax.devices()[: self.size]).reshape(self.data, self.fsdp), AXES)

    def round_up(self, examples: int) -> int:
        """The least number of examples, from this one on, that the devices can share out evenly."""
        return -(-examples // self.size) * self.size

    def share(self, tree: Any, axis: int = 0) -> Any:
        """In a compiled function: arrays whose examples, along an axis, are divided over all devices.

        Arrays whose examples do not divide evenly are left the same on every device.
        """
        if self.is_single:
            return tree

        def constrain(leaf: jax.Array) -> jax.Array:
            spec = PartitionSpec(*[None] * axis, AXES) if leaf.shape[axis] % self.size == 0 else PartitionSpec()
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.grid, spec))

        return jax.tree.map(constrain, tree)

    def divide(self, tree: Any) -> Any:
        """In a compiled function: parameters, or moments of theirs, as they lie on the devices."""
        if self.is_single:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def repeat(self, tree: Any) -> Any:
        """In a compiled function: arrays that are the same on every device."""
        if self.is_single:
            return tree
        return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: self._repeated, tree))

    def shardings(self, tree: Any) -> Any:
        """Where the parts of parameters lie: divided over `fsdp` along the last axis that it divides evenly."""

        def sharding(leaf: Any) -> NamedSharding:
            fits = [axis for axis, size in enumerate(leaf.shape) if size % self.fsdp == 0]
            if self.fsdp == 1 or leaf.size < SMALLEST_DIVIDED or not fits:
                return self._repeated
            return NamedSharding(self.grid, PartitionSpec(*[None] * fits[-1], "fsdp"))

        return jax.tree.map(sharding, tree)

    def place_parameters(self, tree: Any) -> Any:
        """Moves parameters, or moments of theirs, to where they lie."""
        return tree if self.is_single else jax.tree.map(_place, tree, self.shardings(tree))

    def place(self, tree: Any) -> Any:
        """Copies arrays to every device, but those that are divided over the devices already."""

        def place(leaf: Any) -> Any:
            sharding = getattr(leaf, "sharding", None)
            there = isinstance(sharding, NamedSharding) and sharding.mesh == self.grid
            return leaf if there else _place(leaf, self._repeated)

        return tree if self.is_single else jax.tree.map(place, tree)

    def place_batches(self, tree: Any) -> Any:
        """Moves this process's part of arrays `[batches, B, ...]` to its devices, which share out the examples."""
        sharding = NamedSharding(self.grid, PartitionSpec(None, AXES))
        return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), tree)

    def place_examples(self, tree: Any) -> Any:
        """Moves arrays `[examples, ...]` to the devices, divided evenly over all of them where that can be."""
        divided = NamedSharding(self.grid, PartitionSpec(AXES))
        return tree if self.is_single else jax.tree.map(
            lambda leaf: _place(leaf, divided if leaf.shape[0] % self.size == 0 else self._repeated), tree
        )  # fmt: skip

    def add_up(self, tree: Any) -> Any:
        """In a function of `by_device`: the sums over all devices."""
        return jax.lax.psum(tree, AXES)

    def by_device(self, function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
        """`function` on each device for its part of the arrays.

        Args:
          function: its first argument is the place of the device in the grid, a scalar.
          in_axes: of each further argument the axis along which it is divided; None: it is the same everywhere.
          out_axes: of the result, or of each of several.
        """

        def spec(axis: int | None) -> PartitionSpec:
            return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXES)

        def on_device(*arguments: Any) -> Any:
            return function(jax.lax.axis_index(AXES), *arguments)

        out_specs = tuple(map(spec, out_axes)) if isinstance(out_axes, tuple) else spec(out_axes)
        return jax.shard_map(
            on_device, mesh=self.grid, in_specs=tuple(map(spec, in_axes)), out_specs=out_specs, check_vma=False
        )

    @property
    def _repeated(self) -> NamedSharding:
        return NamedSharding(self.grid, PartitionSpec())

    @classmethod
    def parse(cls, text: str) -> Self:
        """The grid of a setting such as `data=4` or `data=2,fsdp=2`. Raises InputError."""
        sizes = dict[str, int]()
        for part in text.split(","):
            match = re.fullmatch(r"\s*(data|fsdp)=([1-9]\d{0,5})\s*", part)
            check("mesh", text, "auto, or numbers of devices such as data=4 or data=2,fsdp=2",
                  match is not None and match[1] not in sizes)  # fmt: skip
            sizes |= {match[1]: int(match[2])} if match else {}
        return cls(**sizes)

    def facts(self) -> dict[str, str]:
        """The line that a run tells of its devices; none of a single one."""
        return {} if self.is_single else {"mesh": f"{self}: {self.size} of {jax.device_count()} devices"}

    def summary(self) -> dict[str, dict[str, int]]:
        """What `results.json` says of the devices."""
        return {"mesh": {"data": self.data, "fsdp": self.fsdp, "processes": jax.process_count()}}

    def __str__(self) -> str:
        return f"data={self.data}" + (f",fsdp={self.fsdp}" if self.fsdp > 1 else "")


ONE_DEVICE = DeviceMesh()


def choose_mesh(asked: str, examples: int) -> DeviceMesh:
    """The grid of a setting: for `auto` as many of the devices as share out the examples evenly.

    Args:
      examples: of a batch, or those computed at a time where they are fewer.

    Raises:
      InputError: more devices than there are, or examples that they cannot share out evenly.
    """
    there = jax.device_count()
    if asked == "auto":
        least = there if are_several() else 1  # each process needs to have a part in it
        mesh = DeviceMesh(max((number for number in range(least, there + 1) if examples % number == 0), default=there))
    else:
        mesh = DeviceMesh.parse(asked)
        check("mesh", asked, f"of no more devices than the {there} here", mesh.size <= there)
        check("mesh", asked, f"of all {there} devices of the {jax.process_count()} processes",
              mesh.size == there or not are_several())  # fmt: skip
    if examples % mesh.size:
        raise InputError(
            f"mesh: {mesh.size} devices cannot share out {examples} examples evenly; change batch_size or micro_batch"
        )
    return mesh


def place_beside(params: Any, examples: Any) -> Any:
    """Moves arrays `[examples, ...]` to the devices on which some parameters lie, to share them out; else nothing."""
    first = next(iter(jax.tree.leaves(params)), None)
    sharding = getattr(first, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
        return DeviceMesh(**sharding.mesh.shape).place_examples(examples)
    return examples


def _place(leaf: Any, sharding: NamedSharding) -> Any:
    """An array moved to where its parts lie; of a shape and type, which a plan is made of, one that says so."""
    if isinstance(leaf, int):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    if not are_several():
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(leaf), sharding))
    numbers = host_copies(leaf)
    return jax.make_array_from_callback(numbers.shape, sharding, lambda part: numbers[part])
