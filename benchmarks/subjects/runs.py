"""Whole runs of the library, reduced to the figures by which runs are compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from newllm_jax.config import CascadeConfig, NewLLMConfig

STAGE = ("stage", "train_tokens", "val_tokens", "threshold", "val_threshold", "last", "best")
ENSEMBLE = ("stages", "val_loss", "val_ppl")


def newllm(task: dict[str, Any]) -> dict[str, Any]:
    """Trains New-LLM as `train.py` does: its best epoch, its figures on the test split, validation losses by epoch."""
    from newllm_jax.newllm.experiment import train_newllm

    result = train_newllm(NewLLMConfig.from_dict(task["config"]), run_root=Path(task["folder"]) / "runs")
    shutil.rmtree(result.run_dir)
    found = result.results
    return {
        "precision": found["environment"]["precision"],
        "seed": found["config"]["seed"],
        "epochs": len(found["epochs"]),
        "best": found["best"],
        "test": found["test"],
        "val_losses": [round(epoch["val_loss"], 5) for epoch in found["epochs"]],
        **_software(found),
    }


def cascade(task: dict[str, Any]) -> dict[str, Any]:
    """Trains CASCADE as `cascade.py` does: the last and the best epoch of every stage, and the ensemble."""
    from newllm_jax.cascade.experiment import train_cascade

    result = train_cascade(CascadeConfig.from_dict(task["config"]), run_root=Path(task["folder"]) / "runs")
    shutil.rmtree(result.run_dir)
    found = result.results
    return {
        "precision": found["environment"]["precision"],
        "seed": found["config"]["seed"],
        "stages": [{key: stage[key] for key in STAGE} for stage in found["stages"]],
        "ensemble": [{key: row[key] for key in ENSEMBLE} for row in found["ensemble"]],
        **_software(found),
    }


def _software(results: dict[str, Any]) -> dict[str, Any]:
    return {key: results["environment"][key] for key in ("jax", "device")}
