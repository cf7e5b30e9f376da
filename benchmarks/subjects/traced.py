"""Updates of either system under JAX's profiler, on random ids or random hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.subjects.jax_cascade import base_and_chunks, stage_training, synthetic_tokens
from benchmarks.subjects.jax_newllm import random_ids, training, words
from newllm_jax.cascade.extraction import batch_chunks, extract
from newllm_jax.config import CascadeConfig, load_config
from newllm_jax.newllm.updates import training_precision
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.training.precision import resolve_precision


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Runs the updates once to compile and warm up, then under the profiler.

    Returns:
      The number of time steps or layers in an update (`steps`), which of the two (`unit`), and the precision.
    """
    system, name = task["what"].split(":")
    run, steps, unit, precision = (newllm if system == "newllm" else cascade)(name, task)
    run()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # its events would crowd out the kernels
    with jax.profiler.trace(task["trace"], profiler_options=options):
        run()
    return {"steps": steps, "unit": unit, "precision": precision}


def newllm(name: str, task: dict[str, Any]) -> tuple[Callable[[], Any], int, str, str]:
    """The updates of a configuration."""
    config, updates = load_config(name, {"precision": task["precision"]}), task["updates"]
    vocabulary = words(config)
    trained = training(config, vocabulary, random_ids(config, vocabulary), 2 * updates)
    trained.prepare()
    return lambda: trained.run(updates), config.sequence_length - 1, "time step", training_precision(config)


def cascade(name: str, task: dict[str, Any]) -> tuple[Callable[[], Any], int, str, str]:
    """The updates of a stage, or batches of chunks through a base with random weights."""
    config, updates = CascadeConfig(precision=task["precision"]), task["updates"]
    if name == "stage":
        path = str(Path(task["folder"]) / "tokens.npz")
        synthetic_tokens(path, config.batch_size, LlamaConfig())
        trained = stage_training(config, LlamaConfig(), path, 2 * updates)
        trained.prepare()
        return lambda: trained.run(updates), config.stage_layers, "layer", resolve_precision(config.precision)
    base, params, chunks = base_and_chunks(config.override({"train_chunks": updates * batch_chunks()}), real=False)
    return lambda: extract(base, params, chunks, config.criterion), base.config.num_layers, "layer", "fp32"
