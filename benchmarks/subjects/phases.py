"""A phase of New-LLM's time loop on a GPU, one layer of one step: in its two kernels, with their waits and without.

Without them, results are wrong: thread blocks read what others have not written yet. What is left is the time of the
phase's own work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.timing import spread
from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm.dropout import Dropout
from newllm_jax.newllm.model import dropout_rates
from newllm_jax.newllm.recurrence import gpu
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec
from newllm_jax.newllm.updates import training_model, training_precision


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Rows of both kernels, with waits and without: seconds of all phases, and their number.

    Raises:
      InputError: the kernels cannot run here.
    """
    config = NewLLMConfig.from_dict(task["config"])
    precision, steps = training_precision(config), config.sequence_length - 1
    spec = replace(training_model(config, 1, precision).spec, form="gpu")
    if reason := gpu.obstacle(spec, config.batch_size, steps):
        raise InputError(f"sweep: phases are those of the GPU kernels: {reason}")
    counts = {"forward": steps * (spec.num_layers + 1), "backward": steps * (spec.num_layers + 3)}
    rows = []
    for waits, without in (("yes", nullcontext), ("none", waits_left_out)):
        with without():
            kernels = loop_kernels(spec, config, steps)
            for name, run in kernels.items():
                seconds = timed_blocks(run, task["updates"], task["repeats"])
                rows.append({
                    "name": f"{name} kernel", "precision": precision, "waits": waits, "phases": counts[name],
                    "seconds": spread(seconds),
                })  # fmt: skip
    return {"rows": rows}


def timed_blocks(run: Callable[[], Any], calls: int, repeats: int) -> list[float]:
    """Seconds of a call, in each of some blocks of calls; the first call, which compiles, is apart."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls - 1):
            run()
        jax.block_until_ready(run())  # one runs after the other
        seconds.append((time.perf_counter() - started) / calls)
    return seconds


def loop_kernels(spec: CellSpec, config: NewLLMConfig, steps: int) -> dict[str, Callable[[], Any]]:
    """Each kernel as a function without arguments, on random texts and weights; the backward one reads what the forward
    one has stored by then."""
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
    forward = jax.jit(lambda params, context, tokens: gpu.forward(spec, params, context, tokens, dropout))
    backward = jax.jit(lambda *given: gpu.backward(spec, given[0], given[1], dropout, *given[2:]))
    _, stored = forward(*inputs)
    d_last, d_outputs = normal(batch, width), normal(steps, batch, hidden)
    return {"forward": lambda: forward(*inputs), "backward": lambda: backward(params, stored, d_last, d_outputs)}


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
