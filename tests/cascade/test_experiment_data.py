"""The rows that a CASCADE run asks for, and the room that its hidden states take."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from newllm_jax.cascade import plan as cascade_plan
from newllm_jax.cascade.experiment import train_cascade
from newllm_jax.cascade.plan import plan_cascade
from newllm_jax.config import CascadeConfig
from newllm_jax.errors import InputError
from newllm_jax.smollm.base import load_base_and_data, source_warnings


def quiet(_: str) -> None:
    pass


def train(config, tmp_path, **options):
    return train_cascade(config, run_root=tmp_path, narrate=quiet, **options)


def test_all_rows_can_be_asked_for(tiny, tmp_path):
    plan = plan_cascade(tiny.override({"train_chunks": None}))
    assert (plan["data"]["train_chunks"], plan["data"]["validation_chunks"]) == (42 - 5, 5)
    config = tiny.override({"train_chunks": None, "num_stages": 1, "num_epochs": 1})
    result = train(config, tmp_path)
    assert result.results["data"] == plan["data"]
    assert json.loads((result.run_dir / "config.json").read_text())["config"]["train_chunks"] is None
    base, data = load_base_and_data(config)
    assert source_warnings(base, data, config) == []


def test_hidden_states_need_room_on_the_disk(tiny, tmp_path, monkeypatch):
    plan = plan_cascade(tiny)
    tokens, hard = (8 + 5) * 128, 614 + 384
    assert plan["estimated_disk_bytes"] == (tokens + 2 * hard) * 16 * 4 + tokens * 13
    free = SimpleNamespace(free=plan["estimated_disk_bytes"] - 1)
    monkeypatch.setattr(cascade_plan.shutil, "disk_usage", lambda folder: free)
    train(
        tiny.override({"num_stages": 1, "num_epochs": 1}), tmp_path / "small"
    )  # one stage has fewer; and all are small
    monkeypatch.setattr(cascade_plan, "SMALL", 0)
    with pytest.raises(InputError) as raised:
        train(tiny, tmp_path / "new" / "runs")
    assert str(raised.value) == (
        f"train_chunks: the hidden states of 1,664 tokens need 0.00 GiB of disk, {tmp_path} has 0.00 GiB free; "
        "lower train_chunks (now 8), or make room"
    )
    assert not (tmp_path / "new").exists()


def test_too_few_rows(tiny, tmp_path):
    with pytest.raises(InputError, match="too few rows: they give 42 chunks of 129 tokens, 1100 are asked for"):
        train(tiny.override({"train_chunks": 1000, "validation_chunks": 100}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_builtin_rows_give_what_they_have(tiny, tmp_path):
    config = tiny.override({"dataset": "builtin", "train_chunks": 10**6, "validation_chunks": 10**5})
    base, data = load_base_and_data(config)
    assert len(data.train) > 1000
    assert len(data.train) // len(data.validation) == 10
    (warning,) = source_warnings(base, data, config)
    assert "fewer than the 1000000 + 100000" in warning


@pytest.mark.parametrize("value", [0, 1, 1.5, float("nan"), "most", True])
def test_hard_ratio_outside_0_and_1(value):
    with pytest.raises(InputError, match="hard_ratio"):
        CascadeConfig().override({"hard_ratio": value})
    assert np.isfinite(CascadeConfig().hard_ratio)
