"""What a New-LLM run would be, for `--dry_run`: nothing is trained, no run directory is made."""

from __future__ import annotations

import math
from typing import Any

import jax

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.updates import build_training, initial_state, training_model, training_precision
from newllm_jax.newllm.wikitext import SPLITS, load_wikitext
from newllm_jax.records.machine import environment, peak_memory_bytes
from newllm_jax.training.memory import update_bytes


def plan_newllm(config: NewLLMConfig) -> dict[str, Any]:
    """The resolved configuration, counts of data, parameters and updates, and an estimate of the memory.

    The memory is XLA's own plan of the compiled update, with the data; on a CPU, with what the process holds by then.
    """
    precision = training_precision(config)
    data = load_wikitext(config)
    model = training_model(config, len(data.tokenizer), precision)
    summary = data.summary(config.batch_size)
    steps = summary["steps_per_epoch"]
    training, optimizer = build_training(config, model, steps)
    state = jax.eval_shape(lambda: initial_state(config, model, optimizer))
    needed = update_bytes(training.updates, state, data.sequences["train"], steps, config.batch_size)
    needed += sum(data.sequences[split].nbytes for split in SPLITS if split != "train")
    if jax.devices()[0].platform == "cpu":
        needed += peak_memory_bytes()
    return {
        "system": config.system,
        "config": config.to_dict(),
        "environment": environment(precision),
        "data": summary,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "updates_per_epoch": steps,
        "updates": steps * config.num_epochs,
        "estimated_memory_bytes": needed,
    }
