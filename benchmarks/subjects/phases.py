"""The two passes of New-LLM's time loop on a GPU, by form; of `gpu.py` also without the waits: what waiting takes.

Without them, results are wrong: thread blocks read what others have not written yet. A pass is its kernel and what XLA
does before and after it; backward, that is the gradients of the weights. So the time of a pass by its number of phases
is more than that of a phase, but the difference between both ways is the waits' alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.timing import block_seconds, spread
from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm.dropout import Dropout
from newllm_jax.newllm.model import ContextVectorLM, dropout_rates
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec, Form
from newllm_jax.newllm.recurrence.scan import forms_for, kernel_obstacle, module_of
from newllm_jax.newllm.updates import training_precision

KERNELS = {"gpu": "", "cluster": ", in clusters"}  # the forms that are kernels, as their rows are called


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """A row of each pass in each form that has kernels: its seconds as it is and without waits, and its phases.

    Raises:
      InputError: the kernels cannot run here.
    """
    config = NewLLMConfig.from_dict(task["config"])
    precision, steps = training_precision(config), config.sequence_length - 1
    spec = ContextVectorLM.from_config(config, 1, precision).spec
    if reason := kernel_obstacle(spec, config.batch_size, steps):
        raise InputError(f"sweep: phases are those of the GPU kernels: {reason}")

    def times(form: Form) -> dict[str, dict[str, float]]:
        passes = loop_passes(replace(spec, form=form), config, steps)
        seconds = {name: block_seconds(run, task["updates"], task["repeats"]) for name, run in passes.items()}
        return {name: spread(each) for name, each in seconds.items()}

    rows = []
    for form in forms_for(spec, config.batch_size, steps):
        if form not in KERNELS:
            continue
        as_it_is, without = times(form), {}
        if form == "gpu":
            with waits_left_out():
                without = times(form)
        for name, phases in phase_counts(spec, steps).items():
            row = {
                "name": f"{name}{KERNELS[form]}",
                "precision": precision,
                "phases": phases,
                "seconds": as_it_is[name],
            }
            rows.append(row | ({"seconds_without_waits": without[name]} if without else {}))
    return {"rows": rows}


def phase_counts(spec: CellSpec, steps: int) -> dict[str, int]:
    """How many phases each kernel has between its waits, the one before its first step left out."""
    return {"forward": steps * (spec.num_layers + 1), "backward": steps * (spec.num_layers + 2)}


def loop_passes(spec: CellSpec, config: NewLLMConfig, steps: int) -> dict[str, Callable[[int], None]]:
    """Each pass as a function that makes it so many times and waits, on random texts and weights.

    The backward pass reads what a forward pass has stored when this is called.
    """
    draw = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * draw.standard_normal(shape), jnp.float32)

    batch, hidden, width = config.batch_size, spec.hidden_dim, spec.context_dim
    layers = [(normal(hidden, hidden, scale=(2 / hidden) ** 0.5), normal(hidden)) for _ in range(spec.num_layers - 1)]
    params = CellParams(
        context_in=normal(width, hidden, scale=width**-0.5), hidden=tuple(layers),
        gates=(normal(hidden, 3 * width, scale=hidden**-0.5), normal(3 * width)), norm=(normal(width), normal(width)),
    )  # fmt: skip
    rates, key = dropout_rates(config), jax.random.key(0)
    dropout = CellDropout(*(
        Dropout.from_key(key, rates[name], 0) if name in rates else None for name in ("dropout", "variational_dropout")
    ))  # fmt: skip
    inputs = params, normal(batch, width), normal(steps, batch, hidden)
    loop = module_of(spec.form)
    forward = jax.jit(lambda params, context, tokens: loop.forward(spec, params, context, tokens, dropout))
    backward = jax.jit(lambda *given: loop.backward(spec, given[0], given[1], dropout, *given[2:]))
    _, stored = forward(*inputs)
    return {
        "forward": partial(_run, forward, inputs),
        "backward": partial(_run, backward, (params, stored, normal(batch, width), normal(steps, batch, hidden))),
    }


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], calls: int) -> None:
    """Calls one after the other; when the last one is done, all are."""
    for _ in range(calls - 1):
        function(*arguments)
    jax.block_until_ready(function(*arguments))


@contextmanager
def waits_left_out() -> Iterator[None]:
    """Kernels that are compiled within do not wait; they still read the counter once in each phase."""
    from jax.experimental.pallas import triton as plgpu

    from newllm_jax.newllm.recurrence import gpu_group

    def read_counter(counters: Any, index: Any, blocks: int, arrivals: Any, meanwhile: Any = lambda: ()) -> Any:
        plgpu.debug_barrier()
        zero = jnp.minimum(plgpu.load(counters.at[index], volatile=True), 0)
        return arrivals + blocks, zero, meanwhile()

    waiting, gpu_group.wait_for_blocks = gpu_group.wait_for_blocks, read_counter
    try:
        yield
    finally:
        gpu_group.wait_for_blocks = waiting
