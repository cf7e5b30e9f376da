"""What a fine-tuning would be, for `--dry_run`: no weights are read, nothing is trained, no run directory is made."""

from __future__ import annotations

from typing import Any

import jax

from newllm_jax.config import FinetuneConfig, Precision
from newllm_jax.finetuning.adaptation import Adaptation, choose_adaptation
from newllm_jax.finetuning.updates import build_training
from newllm_jax.records.machine import environment, peak_memory_bytes
from newllm_jax.smollm.alpaca import STRIDE, AlpacaChunks, load_alpaca
from newllm_jax.smollm.base import describe_base
from newllm_jax.smollm.model import parameter_shapes
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.memory import ADAM_BYTES, FLOAT, check_memory, update_bytes
from newllm_jax.training.mesh import choose_mesh
from newllm_jax.training.precision import resolve_precision
from newllm_jax.training.step import count_parameters, init_state


def plan_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """The resolved configuration, counts of data, parameters and updates, and an estimate of the memory.

    The memory is XLA's own plan of the compiled update on each device, with the data. A CPU also holds what the process
    has by now, the base as it was read, and a checkpoint that is being written.

    Raises:
      InputError: a setting or source that cannot be used.
    """
    precision = resolve_precision(config.precision)
    source, llama, tokenizer = describe_base(config)
    adaptation = choose_adaptation(config, llama)
    data = load_alpaca(tokenizer, config)
    check_fits(config, adaptation, data, precision)
    base_size, steps = count_parameters(parameter_shapes(llama)), -(-len(data.train) // config.batch_size)
    needed = planned_memory(config, adaptation, data, precision)
    mesh = choose_mesh(config.mesh, config.examples_at_once)
    if jax.devices()[0].platform == "cpu":  # whose devices share the memory of the machine
        needed = needed * mesh.size + peak_memory_bytes() + (base_size + 3 * adaptation.sizes()[1]) * FLOAT
    return {
        "system": config.system,
        "config": config.to_dict(),
        "environment": environment(precision),
        "data": data.summary(),
        "base": {**source.provenance(), "parameters": base_size, "layers": llama.num_layers},
        **adaptation.results(),
        **mesh.summary(),
        "updates_per_epoch": steps,
        "updates": steps * config.num_epochs,
        "estimated_memory_bytes": needed,
    }


def check_fits(config: FinetuneConfig, adaptation: Adaptation, data: AlpacaChunks, precision: Precision) -> None:
    """Raises InputError where a run would not fit into the memory that is free."""
    frozen, trained = adaptation.sizes()
    llama, mesh = adaptation.upper, choose_mesh(config.mesh, config.examples_at_once)
    layer = llama.hidden_size if config.recompute else 2 * llama.hidden_size + 2 * llama.intermediate_size
    stored = llama.num_layers * layer + llama.vocab_size
    check_memory({
        "base_model": (FLOAT * frozen + ADAM_BYTES * trained) // mesh.fsdp,
        "micro_batch or batch_size": config.examples_at_once // mesh.size * STRIDE * stored * FLOAT,
    }, lambda: planned_memory(config, adaptation, data, precision))  # fmt: skip


def planned_memory(config: FinetuneConfig, adaptation: Adaptation, data: AlpacaChunks, precision: Precision) -> int:
    """The bytes of the device that training takes, by XLA's plan of the update, which is compiled."""
    frozen, trained = adaptation.shapes()
    training, optimizer = build_training(config, adaptation, frozen, precision)
    state = jax.eval_shape(lambda params: init_state(params, optimizer, initial_loss_scale(precision)), trained)
    steps = -(-len(data.train) // config.batch_size)
    return update_bytes(training.updates, state, data.train, steps, config.batch_size) + data.validation.nbytes
