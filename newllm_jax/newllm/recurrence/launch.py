"""What the GPU kernels of the time loop are launched with, and how several members of a `jax.vmap` are at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import CellDropout, CellSpec


def numbering_obstacle(spec: CellSpec, batch: int, steps: int) -> str:
    """Why a kernel cannot number all activations, those of rows that fill up the batch included; "" where it can."""
    if spec.num_layers * (steps + 1) * (batch + 64) * spec.hidden_dim < 2**31:
        return ""
    return "32 bits cannot number the activations; use a smaller micro_batch or sequence_length"


def mask_seeds(dropout: CellDropout) -> jax.Array:
    """Of each kind of dropout, its two seeds and `Rate.least`: uint32 `[K, 3]`; zeros where there is none."""
    drawn = [jnp.append(each.seeds, jnp.uint32(each.rate.least)) for each in dropout if each]
    return jnp.stack(drawn) if drawn else jnp.zeros((1, 3), jnp.uint32)


def pad_batch(x: jax.Array, multiple: int) -> jax.Array:
    """Fills the batch, the last axis but one, up to a multiple with zeros."""
    missing = -x.shape[-2] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing else x


def scale_of(dropout: CellDropout) -> jax.Array:
    """`CellDropout.scale` as the kernels read it, `[1]`."""
    return jnp.asarray(dropout.scale, jnp.float32).reshape(1)


def launch_members(
    launch: Callable[[Sequence[jax.Array]], Sequence[jax.Array]], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
    """Launches a kernel, also for all members of a `jax.vmap` at once: a launch for each would take as often as long.

    Args:
      launch: (the kernel's arrays of M members, `[M, ...]` each) -> its results, `[M, ...]` each.
      arrays: of one member, without that axis.

    Returns:
      The results, without that axis.
    """

    @jax.custom_batching.custom_vmap
    def launch_one(*arrays: jax.Array) -> list[jax.Array]:
        return [x[0] for x in launch([x[None] for x in arrays])]

    @launch_one.def_vmap
    def launch_all(members: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[list[jax.Array], list[bool]]:
        found = launch(
            [
                x if has_members else jnp.broadcast_to(x, (members, *x.shape))
                for x, has_members in zip(arrays, batched, strict=True)
            ]
        )
        return list(found), [True] * len(found)

    return launch_one(*arrays)
