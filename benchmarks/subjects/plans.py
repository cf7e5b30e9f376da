"""The memory that a run would need, as the library plans it from the compiled programs."""

from __future__ import annotations

from typing import Any

from newllm_jax.cascade.plan import plan_cascade
from newllm_jax.config import CascadeConfig, NewLLMConfig
from newllm_jax.newllm.plan import plan_newllm


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """The size and the estimated memory of a configuration of either system."""
    if task["system"] == "newllm":
        plan = plan_newllm(NewLLMConfig.from_dict(task["config"]))
    else:
        plan = plan_cascade(CascadeConfig.from_dict(task["config"]))
    kept = ("parameters", "updates", "estimated_memory_bytes", "data")
    return {"batch_size": task["config"]["batch_size"], **{key: plan[key] for key in kept}}
