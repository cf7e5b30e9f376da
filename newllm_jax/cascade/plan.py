"""What a CASCADE run would be, for `--dry_run`: no weights are read, nothing is trained, no run directory is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.cascade import extraction
from newllm_jax.cascade.hardness import count_hard, stage_counts
from newllm_jax.cascade.paths import routed_pass
from newllm_jax.cascade.probe import LARGEST_BLOCK
from newllm_jax.cascade.stage.design_training import build_design_training
from newllm_jax.cascade.stage.designs import AnyDesign, SkipDesign, build_design
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config, stage_size
from newllm_jax.cascade.stage.updates import build_stage_training
from newllm_jax.config import CascadeConfig, Precision, check
from newllm_jax.errors import InputError
from newllm_jax.records.machine import environment, peak_memory_bytes
from newllm_jax.smollm.alpaca import CHUNK, AlpacaChunks, load_alpaca
from newllm_jax.smollm.base import describe_base
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2, parameter_shapes
from newllm_jax.training.feed import Held, held
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.memory import ADAM_BYTES, FLOAT, SMALL, check_memory, gib, planned_bytes, update_bytes
from newllm_jax.training.precision import resolve_precision
from newllm_jax.training.step import Params, count_parameters, init_state

TOKEN_BYTES = 13  # of a token beside its hidden state: target, score, loss, hit


def plan_cascade(config: CascadeConfig) -> dict[str, Any]:
    """The resolved configuration, counts of data, parameters and updates by stage, and estimates of memory and disk.

    Token counts follow from the quantile rule, for scores that all differ.

    Raises:
      InputError: a setting or source that cannot be used, or no hard tokens left for a stage.
    """
    precision = resolve_precision(config.precision)
    source, llama, tokenizer = describe_base(config)
    data = load_alpaca(tokenizer, config)
    check_fits(config, llama, data, precision)
    if not config.has_published_design:
        return _plan_design(config, source.provenance(), llama, data, precision)
    base_size = count_parameters(parameter_shapes(llama))
    size = stage_size(stage_config(llama, config.stage_layers))
    counts = [
        stage_counts(n, config.hard_ratio, config.num_stages) for n in (data.train_tokens, data.validation_tokens)
    ]
    stages = []
    for number, (train, validation) in enumerate(zip(*counts, strict=True), 1):
        stages.append({
            "stage": number,
            "total_layers": llama.num_layers + number * config.stage_layers,
            "stage_parameters": size,
            "total_parameters": base_size + number * size,
            "train_tokens": train,
            "val_tokens": validation,
            "updates_per_epoch": -(-train // config.batch_size),
        })  # fmt: skip
    needed = planned_memory(config, llama, data, precision)
    if jax.devices()[0].platform == "cpu":
        needed += peak_memory_bytes() + base_size * FLOAT
    return {
        "system": config.system,
        "config": config.to_dict(),
        "environment": environment(precision),
        "data": data.summary(),
        "base": {**source.provenance(), "parameters": base_size, "layers": llama.num_layers},
        "stages": stages,
        "parameters": stages[-1]["total_parameters"],
        "updates": config.num_epochs * sum(entry["updates_per_epoch"] for entry in stages),
        "estimated_memory_bytes": needed,
        "estimated_disk_bytes": disk_bytes(config, llama, data),
    }


def _plan_design(
    config: CascadeConfig, source: dict[str, Any], llama: LlamaConfig, data: AlpacaChunks, precision: Precision
) -> dict[str, Any]:
    """`plan_cascade` for a design other than the published one."""
    design = build_design(config, SmolLM2(llama), precision)
    base = parameter_shapes(llama)
    size = count_parameters(_trained_shapes(design, config, base))
    base_size, costs = count_parameters(base), design.costs(llama)
    needed = planned_design_memory(config, llama, data, precision)
    if jax.devices()[0].platform == "cpu":
        needed += peak_memory_bytes() + base_size * FLOAT
    steps = -(-len(data.train) // config.batch_size)
    share = config.hard_ratio if config.flops is None else costs.hard_share(config.flops)
    return {
        "system": config.system,
        "config": config.to_dict(),
        "environment": environment(precision),
        "data": data.summary(),
        "base": {**source, "parameters": base_size, "layers": llama.num_layers},
        "stages": [{"stage": 1, "stage_parameters": size, "updates_per_epoch": steps, "path_flops": vars(costs)}],
        "parameters": base_size + size,
        "flops": costs.mean(share),
        "updates": config.num_epochs * steps,
        "estimated_memory_bytes": needed,
        "estimated_disk_bytes": disk_bytes(config, llama, data),
    }


def _trained_shapes(design: AnyDesign, config: CascadeConfig, base: Params) -> Params:
    """What a design trains, as shapes."""
    moment = jnp.eye(design.base.config.hidden_size)
    return jax.eval_shape(lambda base: design.init(base, config.seed, moment), base)


def planned_design_memory(config: CascadeConfig, llama: LlamaConfig, data: AlpacaChunks, precision: Precision) -> int:
    """The larger of the memory peaks of a design's run, by XLA's own plan: an update, or a pass over both paths."""
    design, base = build_design(config, SmolLM2(llama), precision), parameter_shapes(llama)
    training, optimizer = build_design_training(design, design, base)
    scale = initial_loss_scale(precision)
    trained = _trained_shapes(design, config, base)
    state = jax.eval_shape(lambda trained: init_state(trained, optimizer, scale), trained)
    ranks = jax.ShapeDtypeStruct((len(data.train), CHUNK - 1), jnp.float32)
    split = held((data.train, ranks), config.examples, config.batch_size)
    update = update_bytes(training.updates, state, split.data, split.updates, config.batch_size)
    update += split.size - split.data_bytes
    ids = jax.ShapeDtypeStruct((extraction.batch_chunks(), CHUNK), jnp.int32)
    hard = jax.ShapeDtypeStruct((extraction.batch_chunks(), CHUNK - 1), jnp.bool_)
    strict = build_design(config, SmolLM2(llama), "fp32")
    probed = min(probe_bytes(config, llama, data), LARGEST_BLOCK)
    return max(update, probed, planned_bytes(routed_pass.lower(strict, base, state.params, ids, hard).compile()))


def check_fits(config: CascadeConfig, base: LlamaConfig, data: AlpacaChunks, precision: Precision) -> None:
    """Raises InputError where a stage would get no hard tokens, or the run would not fit the memory that is free."""
    if not config.has_published_design:
        design = build_design(config, SmolLM2(base), precision)
        easy = design.costs(base).easy
        check("flops", config.flops, f"at least {easy:.3f}, what a token costs on the easy path, or none",
              config.flops is None or config.flops >= easy)  # fmt: skip
        layers = base.num_layers if isinstance(design, SkipDesign) else design.model.config.num_layers
        stored = layers * (2 * base.hidden_size + 2 * base.intermediate_size) + base.vocab_size
        check_memory(
            {"micro_batch or batch_size": config.examples_at_once * (CHUNK - 1) * stored * FLOAT},
            lambda: planned_design_memory(config, base, data, precision),
        )
        return
    for count in (data.train_tokens, data.validation_tokens):
        stage_counts(count, config.hard_ratio, config.num_stages)
    device, host = memory_bounds(config, base, data)
    if jax.devices()[0].platform == "cpu":
        device |= host
    else:
        check_memory(host, host=True)
    check_memory(device, lambda: planned_memory(config, base, data, precision))


def check_disk(config: CascadeConfig, base: LlamaConfig, data: AlpacaChunks, folder: Path) -> None:
    """Raises InputError where the disk of a folder, perhaps one to be made, has no room for the hidden states of a run.

    What the folder has of them by now, as a run directory, counts as free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    found = sum(file.stat().st_blocks * 512 for file in (folder / "extraction").glob("*") if file.is_file())
    needed, free = disk_bytes(config, base, data), shutil.disk_usage(there).free + found
    tokens = data.train_tokens + data.validation_tokens
    if needed > max(free, SMALL):
        raise InputError(
            f"train_chunks: the hidden states of {tokens:,} tokens need {gib(needed)} of disk, {there} has {gib(free)} "
            f"free; lower train_chunks (now {len(data.train):,}), or make room"
        )


def disk_bytes(config: CascadeConfig, base: LlamaConfig, data: AlpacaChunks) -> int:
    """The most bytes on disk that a run has at a time beside its checkpoints: hidden states, until it is finished.

    With the published design those of all tokens, of the hard ones of a stage, and what the stage makes of these.
    """
    if not config.has_published_design:
        return probe_bytes(config, base, data)
    tokens = data.train_tokens, data.validation_tokens
    hard = sum(count_hard(count, config.hard_ratio) for count in tokens)
    states = sum(tokens) + hard * min(config.num_stages, 2)
    return states * base.hidden_size * FLOAT + sum(tokens) * TOKEN_BYTES


def probe_bytes(config: CascadeConfig, base: LlamaConfig, data: AlpacaChunks) -> int:
    """The hidden states that a probe is trained on, in a file."""
    return data.train_tokens * base.hidden_size * FLOAT if config.criterion == "probe" else 0


def memory_bounds(
    config: CascadeConfig, base: LlamaConfig, data: AlpacaChunks
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """The bytes that a run takes at least, of the device and of the machine, by the settings that they grow with.

    The base is not among them: a run has read it by then. The device holds a stage in training, the hidden states of
    its hard tokens (or, where they are fed from files, blocks of them) and what a batch stores; the machine ids,
    scores and losses of all tokens, and the trained stages. Hidden states are on disk, see `disk_bytes`.
    """
    stage = stage_size(stage_config(base, config.stage_layers))
    stored = config.stage_layers * (2 * base.hidden_size + 2 * base.intermediate_size) + base.vocab_size
    first = count_hard(data.train_tokens, config.hard_ratio)
    device = {
        "stage_layers": ADAM_BYTES * stage,
        "micro_batch or batch_size": config.examples_at_once * stored * FLOAT,
        "hard_ratio or train_chunks": _held_tokens(first, config, base).size,
    }
    host = {
        "train_chunks or validation_chunks": (data.train_tokens + data.validation_tokens) * (FLOAT + TOKEN_BYTES),
        "num_stages": config.num_stages * stage * FLOAT,
    }
    return device, host


def planned_memory(config: CascadeConfig, base: LlamaConfig, data: AlpacaChunks, precision: Precision) -> int:
    """The larger of the two memory peaks of a run, by XLA's own plan of the compiled programs.

    The base reads a batch of chunks; the first stage trains on the most tokens. A CPU also holds the trained stages,
    and a checkpoint that is being written. Pages of files, which the system keeps while there is room, are not counted.
    """
    ids = jax.ShapeDtypeStruct((extraction.batch_chunks(), CHUNK), jnp.int32)
    read = extraction.read_chunks.lower(SmolLM2(base), config.criterion, parameter_shapes(base), ids)
    reading = planned_bytes(read.compile())
    stage = Stage(stage_config(base, config.stage_layers), precision)
    shared = build_stage_training(stage, config)
    scale = initial_loss_scale(precision)
    state = jax.eval_shape(lambda: init_state(init_stage(stage, config.seed, 1), shared.optimizer, scale))
    tokens = count_hard(data.train_tokens, config.hard_ratio)
    split = _held_tokens(tokens, config, base)
    held_out = _held_tokens(count_hard(data.validation_tokens, config.hard_ratio), config, base)
    training = update_bytes(shared.training.updates, state, split.data, split.updates, config.batch_size)
    training += split.size - split.data_bytes + held_out.size
    if jax.devices()[0].platform != "cpu":
        return max(reading, training)
    host = sum(memory_bounds(config, base, data)[1].values())
    copied = 0 if split.copies > 1 else tokens * base.hidden_size * FLOAT  # on their way from the file
    return host + max(reading, copied + training + count_parameters(state) * FLOAT)


def _held_tokens(tokens: int, config: CascadeConfig, base: LlamaConfig) -> Held:
    """What the device holds of so many hard tokens while a stage trains on them."""
    hidden = jax.ShapeDtypeStruct((tokens, base.hidden_size), jnp.float32)
    return held((hidden, jax.ShapeDtypeStruct((tokens,), jnp.int32)), config.examples, config.batch_size)
