"""Arrays as arguments: kind of numbers and axes, checked while a function is traced, at no cost to what is compiled."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from newllm_jax.errors import InputError, shown

KINDS = {"integers": jnp.integer, "numbers": jnp.floating}


def check_array(name: str, value: Any, kind: Literal["integers", "numbers"], *axes: str | int) -> None:
    """Raises InputError where an argument is no array, or one of another kind or of other axes.

    Args:
      axes: each by its letter, or by its size where that must fit; `...` in front stands for any number of them.
    """
    array = hasattr(value, "dtype") and hasattr(value, "shape")
    if not (array and jnp.issubdtype(value.dtype, KINDS[kind]) and _fits(value.shape, axes)):
        given = f"{value.dtype} {list(value.shape)}" if array else shown(value)
        raise InputError(f"{name}: must be an array of {kind} [{', '.join(map(str, axes))}], not {given}")


def _fits(shape: tuple[int, ...], axes: tuple[str | int, ...]) -> bool:
    if axes[:1] == ("...",):
        axes = axes[1:]
        shape = shape[max(len(shape) - len(axes), 0) :]
    sizes = zip(shape, axes, strict=False)
    return len(shape) == len(axes) and all(isinstance(axis, str) or axis == size for size, axis in sizes)
