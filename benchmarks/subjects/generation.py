"""The memory that generating a text takes: the same for a hundred words and for a million."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness.memory import jax_memory
from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.generate import generate
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import NewLLMRun, init_params
from newllm_jax.newllm.tokenizer import EOS, SPECIAL_WORDS, WordTokenizer

NEVER = -1e9  # a logit


def untrained_run(config: NewLLMConfig, vocabulary: int) -> NewLLMRun:
    """A run with its initial weights, except that a text never ends: how long it is does not depend on chance."""
    words = (*SPECIAL_WORDS, *(f"word{index}" for index in range(len(SPECIAL_WORDS), vocabulary)))
    model = ContextVectorLM.from_config(config, vocabulary)
    params = jax.tree.map(jnp.asarray, init_params(model, config.seed))
    params["logits"]["bias"] = params["logits"]["bias"].at[EOS].set(NEVER)
    return NewLLMRun(model, params, config, WordTokenizer(words), 0, "")


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Generates one text of `tokens` words: the memory in use and its peak, and words a second."""
    run = untrained_run(NewLLMConfig.from_dict(task["config"]), task["vocabulary"])
    for _ in generate(run, max_words=2):
        pass  # compiles
    started = time.perf_counter()
    count = sum(1 for _ in generate(run, max_words=task["tokens"]))
    seconds = time.perf_counter() - started
    if count != task["tokens"]:
        raise RuntimeError(f"the text ended after {count} words")
    return {"tokens": count, "seconds": seconds, "tokens_per_second": count / seconds, **jax_memory()}
