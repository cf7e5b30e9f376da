"""What a CASCADE run would be, for `--dry_run`: no weights are read, nothing is trained, no run directory is made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.cascade import extraction
from newllm_jax.cascade.hardness import stage_counts
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.cascade.stage.updates import build_stage_training
from newllm_jax.config import CascadeConfig
from newllm_jax.records.machine import environment, peak_memory_bytes
from newllm_jax.smollm.alpaca import CHUNK, AlpacaChunks, load_alpaca
from newllm_jax.smollm.base import describe_base
from newllm_jax.smollm.model import SmolLM2, parameter_shapes
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.memory import planned_bytes, update_bytes
from newllm_jax.training.precision import resolve_precision
from newllm_jax.training.step import count_parameters, init_state

FLOAT = 4  # bytes


def plan_cascade(config: CascadeConfig) -> dict[str, Any]:
    """The resolved configuration, counts of data, parameters and updates by stage, and an estimate of the memory.

    Token counts follow from the quantile rule, for scores that all differ.

    Raises:
      InputError: a setting or source that cannot be used, or no hard tokens left for a stage.
    """
    precision = resolve_precision(config.precision)
    source, llama, tokenizer = describe_base(config)
    data = load_alpaca(tokenizer, config)
    base, stage = SmolLM2(llama), Stage(stage_config(llama, config.stage_layers), precision)
    base_shapes = parameter_shapes(llama)
    stage_shapes = jax.eval_shape(lambda: init_stage(stage, config.seed, 1))
    base_size, stage_size = count_parameters(base_shapes), count_parameters(stage_shapes)
    counts = [
        stage_counts(n, config.hard_ratio, config.num_stages) for n in (data.train_tokens, data.validation_tokens)
    ]
    stages = []
    for number, (train, validation) in enumerate(zip(*counts, strict=True), 1):
        stages.append({
            "stage": number,
            "total_layers": llama.num_layers + number * config.stage_layers,
            "stage_parameters": stage_size,
            "total_parameters": base_size + number * stage_size,
            "train_tokens": train,
            "val_tokens": validation,
            "updates_per_epoch": -(-train // config.batch_size),
        })  # fmt: skip
    return {
        "system": config.system,
        "config": config.to_dict(),
        "environment": environment(precision),
        "data": data.summary(),
        "base": {**source.provenance(), "parameters": base_size, "layers": llama.num_layers},
        "stages": stages,
        "parameters": stages[-1]["total_parameters"],
        "updates": config.num_epochs * sum(entry["updates_per_epoch"] for entry in stages),
        "estimated_memory_bytes": estimated_memory(config, base, base_shapes, stage, data, stages[0]),
    }


def estimated_memory(
    config: CascadeConfig, base: SmolLM2, base_shapes: Any, stage: Stage, data: AlpacaChunks, first: dict[str, Any]
) -> int:
    """The larger of the two memory peaks of a run, by XLA's own plan of the compiled programs.

    The base reads a batch of chunks; the first stage trains on the most tokens. A CPU also holds what the process has
    by now, the base as it was read, the hidden states and trained stages, and a checkpoint that is being written.
    """
    ids = jax.ShapeDtypeStruct((extraction.batch_chunks(), CHUNK), jnp.int32)
    reading = planned_bytes(extraction.read_chunks.lower(base, config.criterion, base_shapes, ids).compile())
    shared = build_stage_training(stage, config)
    scale = initial_loss_scale(stage.precision)
    state = jax.eval_shape(lambda: init_state(init_stage(stage, config.seed, 1), shared.optimizer, scale))
    hidden, tokens = base.config.hidden_size, first["train_tokens"]
    split = jax.ShapeDtypeStruct((tokens, hidden), jnp.float32), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    training = update_bytes(shared.training.updates, state, split, first["updates_per_epoch"], config.batch_size)
    training += first["val_tokens"] * hidden * FLOAT
    if jax.devices()[0].platform != "cpu":
        return max(reading, training)
    base_bytes = count_parameters(base_shapes) * FLOAT
    host = (data.train_tokens + data.validation_tokens) * hidden * FLOAT
    host += config.num_stages * count_parameters(state.params) * FLOAT
    checkpoint = count_parameters(state) * FLOAT
    return peak_memory_bytes() + base_bytes + host + max(reading, tokens * hidden * FLOAT + training + checkpoint)
