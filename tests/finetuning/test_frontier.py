"""The point of a fine-tuned model on a frontier."""

from __future__ import annotations

import numpy as np
import pytest

from newllm_jax import restore
from newllm_jax.errors import InputError
from newllm_jax.finetuning.experiment import finetune
from newllm_jax.finetuning.frontier import frontier_entries
from newllm_jax.smollm.alpaca import load_alpaca


@pytest.fixture(scope="module")
def pruned(deep, tmp_path_factory):
    """A run on a base without two of its four layers."""
    config = deep.override({
        "dropped_layers": [1, 3], "adapter": "lora", "test_chunks": 5, "whole_rows": True, "num_epochs": 1,
    })  # fmt: skip
    return finetune(config, name="pruned", run_root=tmp_path_factory.mktemp("pruned"), narrate=str)


def test_a_pruned_model_costs_what_is_left_of_it(pruned):
    run = restore(pruned.run_dir)
    chunks = load_alpaca(run.base.tokenizer, run.config).test
    (entry,) = frontier_entries(pruned.run_dir, {"other": chunks[:2]})
    (point,) = entry["points"]
    layer, head = 1920, 257 * 16  # multiplications
    assert point["flops"] == pytest.approx((2 * layer + head) / (4 * layer + head))
    logits = np.asarray(run.base.model.apply({"params": run.base.params}, chunks[:, :-1])[0], np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    taken = np.take_along_axis(logits, chunks[:, 1:, None], axis=-1)[..., 0]
    losses = np.log(np.exp(logits).sum(axis=-1)) - taken
    assert chunks.shape == (5, 129)
    assert point["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert point["low"] < point["loss"] < point["high"]
    assert entry["elsewhere"]["other"]["loss"] == pytest.approx(losses[:2].mean(), rel=1e-5)
    assert entry["trained_parameters"] == pruned.results["trained_parameters"]
    assert (entry["name"], entry["system"], entry["policy"]) == (pruned.run_dir.name, "finetune", "none")


def test_a_run_without_test_chunks_has_no_point(pruned, tmp_path, deep):
    run = finetune(deep.override({"num_epochs": 1}), run_root=tmp_path, narrate=str)
    with pytest.raises(InputError, match=r"test_chunks: must be above 0 in .*, for a frontier, not 0"):
        frontier_entries(run.run_dir, {})
