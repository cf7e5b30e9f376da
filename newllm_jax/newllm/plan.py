"""What a New-LLM run would be, for `--dry_run`: nothing is trained, no run directory is made."""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.run import SYSTEM, init_params
from newllm_jax.newllm.updates import build, training_model, training_precision
from newllm_jax.newllm.wikitext import SPLITS, load_wikitext
from newllm_jax.records.machine import environment, peak_memory_bytes
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.step import Totals, init_state


def plan_newllm(config: NewLLMConfig) -> dict[str, Any]:
    """The resolved configuration, counts of data, parameters and updates, and an estimate of the memory.

    The memory is XLA's own plan of the compiled update, with the data; on a CPU, with what the process holds by then.
    """
    precision = training_precision(config)
    data = load_wikitext(config)
    model = training_model(config, len(data.tokenizer), precision)
    summary = data.summary(config.batch_size)
    steps = summary["steps_per_epoch"]
    trainer, optimizer = build(config, model, steps)
    scale = initial_loss_scale(precision)
    state = jax.eval_shape(lambda: init_state(init_params(model, config.seed), optimizer, scale))
    totals = jax.eval_shape(Totals.zero)
    train = data.sequences["train"]
    order = jax.ShapeDtypeStruct((steps, config.batch_size), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    updates = cast(jax.stages.Wrapped, trainer.updates)
    memory = updates.lower(state, totals, train, order, 0, 1, key).compile().memory_analysis()
    assert memory is not None  # every backend of JAX has it
    buffers = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    others = sum(data.sequences[split].nbytes for split in SPLITS if split != "train")
    process = peak_memory_bytes() if jax.devices()[0].platform == "cpu" else 0
    return {
        "system": SYSTEM,
        "config": config.to_dict(),
        "environment": environment(precision),
        "data": summary,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "updates_per_epoch": steps,
        "updates": steps * config.num_epochs,
        "estimated_memory_bytes": process + buffers + memory.temp_size_in_bytes + others,
    }
