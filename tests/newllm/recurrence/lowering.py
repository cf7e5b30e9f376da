"""What is translated for a GPU: the gradient of a loss of the time loop, by everything that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec
from newllm_jax.newllm.recurrence.scan import scan


def gradient_of_a_loss(spec: CellSpec, dropout: CellDropout, batch: int, steps: int) -> tuple[Callable[..., Any], Any]:
    """The function, and the shapes of its arguments."""

    def loss(params: CellParams, context: jax.Array, tokens: jax.Array) -> jax.Array:
        last, outputs = scan(spec, params, context, tokens, dropout)
        return jnp.sum(last) + jnp.sum(outputs.astype(jnp.float32))

    def shape(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    hidden, width = spec.hidden_dim, spec.context_dim
    params = CellParams(
        context_in=shape(width, hidden),
        hidden=((shape(hidden, hidden), shape(hidden)),) * (spec.num_layers - 1),
        gates=(shape(hidden, 3 * width), shape(3 * width)),
        norm=(shape(width), shape(width)),
    )
    return jax.grad(loss, (0, 1, 2)), (params, shape(batch, width), shape(steps, batch, hidden))
