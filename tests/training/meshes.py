"""Trains tiny runs on 8 simulated devices: `python -m tests.training.meshes FOLDER JOB...` prints them as JSON.

The number of devices is fixed before JAX starts, so that tests call it as a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.reliability.tiny import CUTTABLE_LLAMA, settings, write_base, write_sources

DEVICES = 8
DROPOUTS = {f"{kind}dropout": 0.2 for kind in ("", "variational_", "input_", "output_", "weight_", "word_")}
WINDOWS = {**DROPOUTS, "batch_size": 16, "num_epochs": 2, "ema_decay": 0.1, "learning_rate": 0.01}
CHUNKS = {"batch_size": 8, "learning_rate": 0.003, "train_chunks": 20, "validation_chunks": 5, "num_epochs": 2}
DESIGN = {**CHUNKS, "learning_rate": 0.03, "num_stages": 1, "stage_layers": 1}
REENTRY = {**DESIGN, "entry_layer": 1, "context": "sequence", "start": "base", "weights": "lora", "rank": 2,
           "head": "base", "trained_on": "all", "criterion": "probe"}  # fmt: skip

JOBS: dict[str, tuple[str, dict[str, Any]]] = {  # a command, and its settings
    "windows": ("train", WINDOWS),
    "parts": ("train", {**WINDOWS, "micro_batch": 8}),
    "files": ("train", {**WINDOWS, "examples": "files"}),
    "stream": ("train", {**WINDOWS, "text": "stream", "batch_size": 8, "cell": "residual", "tie_embeddings": True}),
    "finetune": ("finetune", CHUNKS),
    "lora": ("finetune", {**CHUNKS, "adapter": "lora", "rank": 2, "micro_batch": 4, "recompute": True}),
    "reentry": ("cascade", REENTRY),
    "published": ("cascade", {"num_epochs": 2, "learning_rate": 0.003}),
}


def train(folder: Path, job: str, mesh: str) -> dict[str, Any]:
    """The losses of a run: of its epochs, and of what it ends with."""
    from newllm_jax import systems
    from newllm_jax.training.mesh import choose_mesh

    command, changed = JOBS[job]
    system = next(each for each in systems.SYSTEMS.values() if each.command == command)
    config = system.config().override({**settings(folder)[command], **changed, "mesh": mesh})
    run = systems.call(system.train, config, run_root=folder / "runs", narrate=lambda line: None)
    stages = run.results.get("stages", [run.results])
    epochs = [[entry[name] for name in ("train_loss", "val_loss", "grad_norm")] for stage in stages for entry in
              stage["epochs"]]  # fmt: skip
    ends = [run.results[name] for name in ("test", "base", "ensemble") if name in run.results]
    grid = choose_mesh(mesh, config.examples_at_once)
    return {"epochs": epochs, "ends": ends, "devices": grid.size, "held": held_bytes(grid)}


def held_bytes(grid: Any) -> int:
    """How many bytes of a base's parameters a device of a grid has."""
    import jax

    from newllm_jax.smollm.llama_config import LlamaConfig
    from newllm_jax.smollm.model import parameter_shapes

    params = jax.tree.map(
        lambda shape: np.zeros(shape.shape, shape.dtype), parameter_shapes(LlamaConfig(**CUTTABLE_LLAMA))
    )
    first = jax.devices()[0]
    placed = jax.tree.leaves(jax.device_put(params) if grid.is_single else grid.place_parameters(params))
    return sum(part.data.nbytes for leaf in placed for part in leaf.addressable_shards if part.device == first)


def sweep(folder: Path, job: str, mesh: str) -> dict[str, Any]:
    """The losses of three members, which no number of devices but 1 and 3 shares out evenly."""
    from newllm_jax.config import NewLLMConfig
    from newllm_jax.newllm.sweep import sweep_newllm

    config = NewLLMConfig().override({**settings(folder)["train"], "num_epochs": 2, "mesh": mesh})
    run = sweep_newllm(config, {"seed": [0, 1, 2]}, run_root=folder / "runs", narrate=lambda line: None)
    rows = [
        [row[name]["loss" if name == "test" else "val_loss"] for name in ("best", "test")]
        for row in run.results["members"]
    ]
    import jax

    return {"epochs": rows, "ends": [], "devices": 1 if mesh == "data=1" else jax.device_count()}


def main(folder: Path, jobs: list[str]) -> None:
    """Writes the sources where there are none, and prints the figures of each job, `name@mesh`, in the last line."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        write_sources(folder)
        write_base(folder / "base", CUTTABLE_LLAMA)
    figures = {}
    for each in jobs:
        job, mesh = each.split("@")
        figures[each] = (sweep if job == "sweep" else train)(folder, job, mesh)
    print(json.dumps(figures))


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    main(Path(sys.argv[1]), sys.argv[2:])
