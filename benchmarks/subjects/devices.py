"""The same updates on one device and on several, timed in turns: every kind of training, on examples drawn at random.

The time of an update does not depend on what the parameters and examples are, so a base has random weights of the
architecture of SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.timing import time_in_turns, updates_needed
from benchmarks.subjects.jax_newllm import orders
from benchmarks.subjects.jax_training import JaxTraining
from newllm_jax.cascade.stage.design_training import build_design_training
from newllm_jax.cascade.stage.designs import build_design
from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig, load_config
from newllm_jax.finetuning.adaptation import choose_adaptation
from newllm_jax.finetuning.updates import build_training as build_finetuning
from newllm_jax.newllm.updates import (
    Numbers,
    build_members,
    build_training,
    initial_state,
    training_model,
    training_precision,
)
from newllm_jax.smollm.alpaca import CHUNK
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.loss_scale import initial_loss_scale
from newllm_jax.training.mesh import DeviceMesh
from newllm_jax.training.precision import resolve_precision
from newllm_jax.training.step import Totals, count_parameters, init_state

WORKS = ("cascade", "lora", "finetune", "wikitext2", "sweep", "small_sweep", "advanced")
SWEPT = {"sweep": "advanced", "small_sweep": "baseline"}  # the configuration of the members
VOCABULARY = {"wikitext2": 33278, "advanced": 1000}
FLOAT = 4


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """A row for each number of devices.

    Args:
      task: `work`, `batch`, `devices` (a list), `updates` and `repeats`; `device_batch`, the most examples that a
        device computes at a time, or None; `fsdp`, whether weights are divided too; `settings` that differ
        from the configuration's.
    """
    builders = {"wikitext2": newllm, "advanced": newllm, **dict.fromkeys(SWEPT, sweep)}
    build = builders.get(task["work"], chunks)
    needed = updates_needed(task["updates"], task["repeats"])
    meshes = [DeviceMesh(1, devices) if task.get("fsdp") else DeviceMesh(devices) for devices in task["devices"]]
    built, rows = [build(task, mesh, needed) for mesh in meshes], []
    measured = time_in_turns([training for training, _ in built], task["updates"], task["repeats"])
    for mesh, (training, sent), times in zip(meshes, built, measured, strict=True):
        rows.append({
            "work": task["work"], "devices": mesh.size, "mesh": str(mesh), "batch": task["batch"],
            "seconds_per_update": times["update_seconds"]["median"], "update_seconds": times["update_seconds"],
            "allreduce_bytes": 0 if mesh.is_single else sent, "losses": times["losses"],
            "planned_bytes": training.planned_bytes,
        })  # fmt: skip
    for row in rows:  # the gradients' size is a property of the work
        row["allreduce_bytes"] = max(each["allreduce_bytes"] for each in rows)
    return {"rows": rows}


def settings_of(task: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """The settings in which a measurement differs from its configuration."""
    batch, at_once = task["batch"], (task.get("device_batch") or task["batch"]) * mesh.size
    part = {"micro_batch": at_once} if at_once < batch else {}
    return {"batch_size": batch, "mesh": str(mesh), **part, **task.get("settings", {})}


def newllm(task: dict[str, Any], mesh: DeviceMesh, updates: int) -> tuple[JaxTraining, int]:
    """New-LLM in the configuration of that name; the bytes of its gradients."""
    config: Any = load_config(task["work"], settings_of(task, mesh))
    model = training_model(config, VOCABULARY[task["work"]], training_precision(config))
    training, optimizer = build_training(config, model, 100)
    state = initial_state(config, model, optimizer)
    draw = np.random.default_rng(0)
    if config.text == "stream":  # every batch is the next piece of each row
        shape = (config.batch_size * updates, config.sequence_length)
        order = np.arange(shape[0], dtype=np.int32).reshape(updates, -1)
    else:
        shape = (2 * config.batch_size, config.sequence_length)
        order = orders(0, shape[0], config.batch_size, updates)
    ids = draw.integers(4, VOCABULARY[task["work"]], shape).astype(np.uint16)
    return JaxTraining(training.updates, state, ids, order, mesh=mesh), FLOAT * count_parameters(state.params)


def chunks(task: dict[str, Any], mesh: DeviceMesh, updates: int) -> tuple[JaxTraining, int]:
    """A training on chunks: `plus` of CASCADE, LoRA or all parameters; the bytes of its gradients."""
    settings, base = settings_of(task, mesh), SmolLM2(LlamaConfig())
    params = jax.jit(base.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (2 * task["batch"], CHUNK)).astype(np.int32)
    if task["work"] == "cascade":
        config: Any = load_config("plus", settings, config_class=CascadeConfig)
        precision = resolve_precision(config.precision)
        design, strict = build_design(config, base, precision), build_design(config, base, "fp32")
        training, optimizer = build_design_training(design, strict, params)
        trained = design.init(params, config.seed, jnp.eye(base.config.hidden_size))
        data: Any = ids, np.zeros((len(ids), CHUNK - 1), np.float32)
    else:
        config = load_config(
            "lora" if task["work"] == "lora" else "smollm2_135m", settings, config_class=FinetuneConfig
        )
        precision = resolve_precision(config.precision)
        adaptation = choose_adaptation(config, base.config)
        training, optimizer = build_finetuning(config, adaptation, adaptation.freeze(params), precision)
        trained, data = adaptation.start(params, config.seed), ids
    state = init_state(trained, optimizer, initial_loss_scale(precision))
    order = orders(0, len(ids), task["batch"], updates)
    return JaxTraining(training.updates, state, data, order, mesh=mesh), FLOAT * count_parameters(trained)


def sweep(task: dict[str, Any], mesh: DeviceMesh, updates: int) -> tuple[InTurn, int]:
    """`batch` members of New-LLM, as many side by side as a device may have; they send each other nothing."""
    config: Any = load_config(SWEPT[task["work"]], {"mesh": "data=1", **task.get("settings", {})})
    at_once = min((task.get("device_batch") or task["batch"]) * mesh.size, task["batch"])
    assert task["batch"] % at_once == 0
    trainings = [SweepTraining(config, at_once, mesh, updates) for _ in range(task["batch"] // at_once)]
    for training in trainings:  # they share one compiled program
        training.updates = trainings[0].updates
    return InTurn(trainings), 0


class InTurn:
    """Several trainings as one under measurement: an update is one of each, after another."""

    def __init__(self, trainings: Sequence[SweepTraining]) -> None:
        self.trainings, self.planned_bytes = trainings, 0

    def prepare(self) -> int:
        """Nothing: the first call compiles."""
        return 0

    def run(self, updates: int) -> None:
        """The next updates of each."""
        for training in self.trainings:
            training.run(updates)

    def loss(self) -> float:
        """The mean loss of all since the beginning."""
        return sum(training.loss() for training in self.trainings) / len(self.trainings)


class SweepTraining:
    """The members of a sweep as a training under measurement: an update is one of each."""

    def __init__(self, config: NewLLMConfig, members: int, mesh: DeviceMesh, updates: int) -> None:
        vocabulary, copies = VOCABULARY["advanced"], range(members)
        model = training_model(config, vocabulary, training_precision(config))
        self.updates: Any = build_members(config, model, 100, members, mesh).updates
        _, optimizer = build_training(config, model, 100)

        def stack(trees: list[Any]) -> Any:
            return mesh.place_examples(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))

        state = initial_state(config, model, optimizer)
        self.states, self.totals = stack([state for _ in copies]), stack([Totals.zero() for _ in copies])
        self.numbers = stack([jax.tree.map(jnp.asarray, Numbers.from_config(config)) for _ in copies])
        shape = 2 * config.batch_size, config.sequence_length
        self.data = mesh.place(np.random.default_rng(0).integers(4, vocabulary, shape).astype(np.uint16))
        self.orders = stack([jnp.asarray(orders(seed, shape[0], config.batch_size, updates)) for seed in copies])
        self.keys = stack([jax.random.key(seed) for seed in copies])
        self.done = 0

    def run(self, updates: int) -> None:
        """The next updates of each member."""
        totals = jax.tree.map(jnp.copy, self.totals)  # they are donated
        self.states, self.totals = self.updates(
            self.numbers, self.states, totals, self.data, self.orders, self.done, self.done + updates, self.keys
        )
        self.done += updates
        jax.block_until_ready(self.totals)

    def loss(self) -> float:
        """The mean loss of all members since the beginning."""
        sums = jax.device_get(self.totals.sums)
        return float(sums.loss.sum()) / int(sums.count.sum())
