"""The point of a fine-tuned model on a frontier of quality against compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from newllm_jax.config import check
from newllm_jax.finetuning.adaptation import choose_adaptation
from newllm_jax.finetuning.run import restore_finetune
from newllm_jax.records.results import check_fingerprints
from newllm_jax.smollm.alpaca import load_alpaca
from newllm_jax.smollm.base import describe_base, fingerprints
from newllm_jax.smollm.decoder import BaseDecoder
from newllm_jax.smollm.flops import Costs
from newllm_jax.smollm.frontier_points import model_losses, point
from newllm_jax.smollm.generation_speed import generation_speed


def frontier_entries(
    run_dir: str | Path, elsewhere: Mapping[str, np.ndarray], speed: bool = False
) -> list[dict[str, Any]]:
    """The point of a run on its test chunks, and on chunks of other texts by name; with `speed`, generation is timed.

    Raises:
      InputError: a run without test chunks.
    """
    run = restore_finetune(run_dir)
    data = load_alpaca(run.base.tokenizer, run.config)
    check_fingerprints(run.run, fingerprints(run.base, data))
    check("test_chunks", len(data.test), f"above 0 in {run.run.path}, for a frontier", len(data.test) > 0)
    _, llama, _ = describe_base(run.config)
    flops = Costs.from_config(run.base.model.config).base / Costs.from_config(llama).base

    def at(chunks: np.ndarray) -> dict[str, Any]:
        return point(model_losses(run.base.model, run.base.params, chunks), flops)

    own = at(data.test)
    if speed:
        own["speed"] = generation_speed(BaseDecoder(run.base.model), run.base.params, data.test)
    return [{
        "name": run.run.path.name,
        "system": run.config.system,
        "config": run.config.to_dict(),
        "policy": "none",
        "trained_parameters": choose_adaptation(run.config, llama).sizes()[1],
        "points": [own],
        "elsewhere": {name: at(chunks) for name, chunks in elsewhere.items()},
    }]  # fmt: skip
