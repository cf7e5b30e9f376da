"""CASCADE as the library runs it, timed: the frozen base's pass over the chunks, and the update of a stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.memory import jax_memory
from benchmarks.harness.timing import loss_curve, spread, time_updates, timed, updates_needed
from benchmarks.subjects.jax_newllm import orders
from benchmarks.subjects.jax_training import JaxTraining, write_weights
from newllm_jax.cascade.extraction import Tokens, batch_chunks, extract
from newllm_jax.cascade.hardness import hardness_threshold, select_hard
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.cascade.stage.updates import build_stage_training
from newllm_jax.config import CascadeConfig
from newllm_jax.smollm.alpaca import CHUNK, load_alpaca
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.smollm.pretrained import load_smollm2
from newllm_jax.smollm.weights import save_model
from newllm_jax.training.precision import resolve_precision
from newllm_jax.training.step import init_state

PUBLISHED_CHUNKS = 1000


def base_and_chunks(config: CascadeConfig, real: bool) -> tuple[SmolLM2, Any, np.ndarray]:
    """The base, its parameters and the train chunks: those of the configuration, or random ones of the same shapes."""
    if real:
        loaded = load_smollm2(config.base_model, config.fallback)
        return loaded.model, jax.device_put(loaded.params), load_alpaca(loaded.tokenizer, config).train
    base = SmolLM2(LlamaConfig())
    params = jax.jit(base.init)(jax.random.key(config.seed), jnp.zeros((1, 2), jnp.int32))["params"]
    shape = (config.train_chunks or PUBLISHED_CHUNKS, CHUNK)
    return base, params, np.random.default_rng(0).integers(0, base.config.vocab_size, shape).astype(np.int32)


def measure_extraction(task: dict[str, Any]) -> dict[str, Any]:
    """The row of the library; leaves base, chunks, losses and, where they are real, the hard tokens in the folder."""
    config, folder = CascadeConfig.from_dict(task["config"]), Path(task["folder"])
    base, params, chunks = base_and_chunks(config, task["real"])
    chunks = chunks[: config.train_chunks]
    prepared = timed(lambda: extract(base, params, chunks[: batch_chunks()], config.criterion))
    passes: list[Tokens] = []
    seconds = [
        timed(lambda: passes.append(extract(base, params, chunks, config.criterion))) for _ in range(task["repeats"])
    ]
    tokens = passes[-1]
    row = {"prepare_seconds": prepared, "pass_seconds": spread(seconds), **jax_memory()}
    save_model(folder / "base", base.config, params)
    np.savez(folder / "extraction.npz", chunks=chunks, losses=tokens.losses)
    if task["real"]:
        hard = tokens.take(select_hard(tokens.scores, hardness_threshold(tokens.scores, config.hard_ratio)))
        np.savez(task["tokens"], hidden=hard.hidden, targets=hard.targets)
    row["llama"] = dataclasses.asdict(base.config)
    return {**row, "chunks": len(chunks), "batch_chunks": batch_chunks(), "mean_loss": float(tokens.losses.mean())}


def synthetic_tokens(path: str, tokens: int, llama: LlamaConfig) -> None:
    """Hidden states N(0, 1), and targets of falling frequency, as words are: the time does not depend on them."""
    draw = np.random.default_rng(0)
    hidden = draw.standard_normal((tokens, llama.hidden_size), np.float32)
    ranks = np.exp(draw.uniform(0, np.log(llama.vocab_size), tokens))  # the frequency of a rank is its inverse
    np.savez(path, hidden=hidden, targets=(ranks - 1).astype(np.int32))


def stage_training(config: CascadeConfig, llama: LlamaConfig, path: str, updates: int) -> JaxTraining:
    """The training of stage 1 as `train_stage` runs it."""
    stage = Stage(stage_config(llama, config.stage_layers), resolve_precision(config.precision))
    shared = build_stage_training(stage, config)
    with np.load(path) as tokens:
        data = tokens["hidden"], tokens["targets"]
    order = orders(config.seed, len(data[1]), config.batch_size, updates)
    state = init_state(init_stage(stage, config.seed, 1), shared.optimizer)
    return JaxTraining(shared.training.updates, state, data, order)


def measure_stage(task: dict[str, Any]) -> dict[str, Any]:
    """The row of the library; leaves the tokens, the order of the batches and the initial weights for the peers."""
    config, llama = CascadeConfig.from_dict(task["config"]), LlamaConfig(**task["llama"])
    if not task["real"]:
        synthetic_tokens(task["tokens"], task["token_count"], llama)
    needed = updates_needed(task["updates"], task["repeats"], task["agreement_updates"])
    ours = stage_training(config, llama, task["tokens"], needed)
    np.save(task["order"], np.asarray(ours.order))
    parameters = write_weights(Path(task["weights"]), ours.state.params)
    row = {"parameters": parameters, "precision": resolve_precision(config.precision), "token_count": len(ours.data[1])}
    row |= time_updates(ours, task["updates"], task["repeats"]) | jax_memory()
    row["planned_memory_bytes"] = ours.planned_bytes
    del ours
    strict = stage_training(config.override({"precision": "fp32"}), llama, task["tokens"], needed)
    return {**row, "losses_strict": loss_curve(strict, task["agreement_updates"])}
