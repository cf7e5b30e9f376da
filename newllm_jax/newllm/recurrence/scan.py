"""The recurrence of New-LLM over a piece of text: the context vector carried through the layers, step by step.

`reference.scan_plain` is the definition, differentiated by JAX. `scan` computes the same in one of three forms of the
time loop, each a module with a forward and a backward pass. In all of them the gradient of every kernel is one large
product over all steps at the end, instead of a small one added up at every step.

    plain   `reference.py`: any device, any cell; its backward pass follows from `cell.step`
    cpu     `cpu.py`: texts as columns, in two halves
    gpu     `gpu.py`: one GPU kernel each way
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import jax

from newllm_jax.newllm.recurrence import cpu, gpu, reference
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec, Form


def form_for(spec: CellSpec, batch: int, steps: int) -> Form:
    """The fastest form of the time loop on the default device that computes this cell."""
    if gpu.supports(spec, batch, steps):
        return "gpu"
    return "cpu" if jax.devices()[0].platform == "cpu" and cpu.supports(spec) else "plain"


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
    spec: CellSpec, params: CellParams, context: jax.Array, tokens: jax.Array, dropout: CellDropout
) -> tuple[jax.Array, jax.Array]:
    """All steps, forward and backward in the form that the specification names.

    Args:
      context: `[B, C]`, before the first token.
      tokens: `[T, B, H]`, the embedding's part of the first layer, its bias included.

    Returns:
      The last context vector `[B, C]`, and the last layer's activations `[T, B, H]`; in the form `gpu` they have
      the type `storage_type(precision)`.
    """
    return _forward(spec, params, context, tokens, dropout)[0]


def _forward(
    spec: CellSpec, params: CellParams, context: jax.Array, tokens: jax.Array, dropout: CellDropout
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    results, residuals = _module(spec.form).forward(spec, params, context, tokens, dropout)
    return results, (params, residuals, dropout)


def _backward(spec: CellSpec, saved: Any, d_results: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    params, residuals, dropout = saved
    return (*_module(spec.form).backward(spec, params, residuals, dropout, *d_results), None)


scan.defvjp(_forward, _backward)


def _module(form: Form) -> ModuleType:
    return {"plain": reference, "cpu": cpu, "gpu": gpu}[form]
