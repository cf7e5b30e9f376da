"""Updates of New-LLM compiled for a T4 that is not there: their kernels and the bytes that these move."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from benchmarks.harness.compiled_text import CompiledText
from benchmarks.harness.t4 import TARGET
from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """An update of a configuration in a precision, as a T4 would run it.

    Raises:
      InputError: this JAX has no compiler for NVIDIA GPUs.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # what is not compiled runs here
    import jax
    from jax.experimental import topologies

    from benchmarks.subjects.jax_newllm import with_form, words
    from newllm_jax.newllm.updates import build_training, initial_state, training_model
    from newllm_jax.training.step import Totals

    try:
        card = topologies.get_topology_desc("", "cuda", target_config=TARGET, topology="1x1x1")
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"t4: no compiler for NVIDIA GPUs here; pip install 'jax[cuda13]' ({error})") from None
    there = jax.sharding.SingleDeviceSharding(card.devices[0])
    config = NewLLMConfig.from_dict(task["config"])
    model = with_form(training_model(config, words(config), task["precision"]), "plain")
    training, optimizer = build_training(config, model, steps_per_epoch=1)
    data = np.zeros((config.batch_size, config.sequence_length), np.uint16)
    order = np.zeros((1, config.batch_size), np.int32)
    updates: Any = training.updates
    state, first, stop = initial_state(config, model, optimizer), np.int32(0), np.int32(1)
    arguments = updates.first, state, Totals.zero(), data, order, first, stop, jax.random.key(0)
    arrays = jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.int32(x), arguments)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), arrays)
    started = time.monotonic()
    compiled = updates.function.lower(*shapes).compile()
    kernels = list(CompiledText(compiled.as_text()).kernels())
    memory = compiled.memory_analysis()
    return {
        "vocabulary": words(config),
        "device": card.devices[0].device_kind,
        "kernels": sum(kernel.runs for kernel in kernels),
        "bytes": sum(kernel.runs * kernel.bytes for kernel in kernels),
        "planned_memory_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "compile_seconds": time.monotonic() - started,
    }
