"""The gradient of a batch's mean loss: of all of its examples at once, of some at a time, or of each device's."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from newllm_jax.errors import InputError
from newllm_jax.training.loss_scale import LossScale
from newllm_jax.training.losses import Sums
from newllm_jax.training.mesh import ONE_DEVICE, DeviceMesh
from newllm_jax.training.split import Carry, Data

Params: TypeAlias = Any  # a tree of arrays


class Point(NamedTuple):
    """What a gradient is taken at: parts of a `step.TrainState`."""

    params: Params
    loss_scale: LossScale | None
    carry: Carry


class Part(NamedTuple):
    """Which part of a batch a loss is computed for.

    Attributes:
      first: the place of the part's first example in the batch, a scalar.
      whole: how many examples the batch has.
    """

    first: jax.Array
    whole: int


class LossFn(Protocol):
    """The loss of a model."""

    def __call__(
        self, params: Params, batch: Data, present: jax.Array, key: jax.Array | None, carry: Carry,
        part: Part | None = None, /,
    ) -> tuple[Sums, Carry]:  # fmt: skip
        """Sums over the targets of the examples that are `present` (bool `[B]`), and the carry for the next batch.

        Args:
          key: of dropout; None without.
          part: where `batch` is a part of a larger batch, which part: its dropout masks are those of its place there.
        """
        ...


def batch_gradient(
    loss_fn: LossFn, at: Point, batch: Data, present: jax.Array, key: jax.Array, size: int, mesh: DeviceMesh
) -> tuple[Params, Sums, Carry]:
    """The gradient of the mean loss of a batch, `size` examples at a time; the loss's sums and carry.

    Where each device has all parameters, it computes the gradient of its examples, and the gradients are added up once.
    Where the parameters are divided, XLA finds out what the devices send each other.
    """
    if mesh.is_single or mesh.fsdp > 1:
        return _accumulated_gradient(loss_fn, at, batch, present, key, size, None, mesh)

    def device_gradient(place: jax.Array, params: Params, scale: LossScale | None, carry: Carry, *others: Any) -> Any:
        batch, present, key = others
        part, at = Part(place * len(present), len(present) * mesh.size), Point(params, scale, carry)
        grads, sums, carry = _accumulated_gradient(loss_fn, at, batch, present, key, size // mesh.size, part)
        total = mesh.add_up(sums)
        grads = mesh.add_up(jax.tree.map(lambda grad: grad * sums.count, grads))
        return jax.tree.map(lambda grad: grad / jnp.maximum(total.count, 1), grads), total, carry

    divided = mesh.by_device(device_gradient, (None, None, 0, 0, 0, None), (None, None, 0))
    return divided(*at, batch, present, key)


def _accumulated_gradient(
    loss_fn: LossFn,
    at: Point,
    batch: Data,
    present: jax.Array,
    key: jax.Array,
    size: int,
    part: Part | None,
    mesh: DeviceMesh = ONE_DEVICE,
) -> tuple[Params, Sums, Carry]:
    """`_gradient`, `size` examples at a time; absent ones fill up the last of the parts.

    The mean gradients of the parts are weighted by their targets. (Gradients of sums would leave the range of fp16.)
    """
    if size >= len(present):
        return _gradient(loss_fn, at, batch, present, key, part)
    if at.carry is not None:
        raise InputError("micro_batch: this loss hands a carry from batch to batch, which parts of a batch cannot do")
    first, whole = part or Part(jnp.zeros((), jnp.int32), len(present))
    parts = -(-len(present) // size)

    def divide(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, parts * size - len(array))] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(parts, size, *array.shape[1:])

    def add(total: tuple[Params, Sums], inputs: Any) -> tuple[tuple[Params, Sums], None]:
        (number, batch, present), (grads, sums) = inputs, total
        more, added, _ = _gradient(loss_fn, at, batch, present, key, Part(first + number * size, whole))
        grads = jax.tree.map(lambda grad, part: grad + added.count * part, grads, more)
        return (mesh.divide(grads), sums + added), None

    zero = jax.tree.map(jnp.zeros_like, at.params), Sums.zero()
    divided = mesh.share(jax.tree.map(divide, (batch, present)), axis=1)
    (grads, sums), _ = jax.lax.scan(add, zero, (jnp.arange(parts), *divided))
    return jax.tree.map(lambda grad: grad / jnp.maximum(sums.count, 1), grads), sums, None


def _gradient(
    loss_fn: LossFn, at: Point, batch: Data, present: jax.Array, key: jax.Array, part: Part | None
) -> tuple[Params, Sums, Carry]:
    """The gradient of the mean loss, multiplied by the loss scale where there is one; the loss's sums and carry."""
    scale = at.loss_scale

    def mean_loss(params: Params) -> tuple[jax.Array, tuple[Sums, Carry]]:
        place = () if part is None else (part,)
        sums, carry = loss_fn(params, batch, present, key, at.carry, *place)
        mean = sums.loss / jnp.maximum(sums.count, 1).astype(jnp.float32)
        return mean if scale is None else mean * scale.value, (sums, carry)

    grads, (sums, carry) = jax.grad(mean_loss, has_aux=True)(at.params)
    return grads, sums, carry
