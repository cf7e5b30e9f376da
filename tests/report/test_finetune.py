"""The report of a fine-tuning, for results of today and of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from newllm_jax.report.finetune import finetune_report, model_text

pytestmark = pytest.mark.quick
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "cascade" / "finetune-135m-lr1e-5.json"
COUNTS = {"layers": 30, "parameters": 134_515_008, "trained_parameters": 4_884_480}


def test_results_of_earlier_versions_have_a_report():
    text = finetune_report({"name": "some", **json.loads(RESULTS.read_text())})
    assert "| model | 30 layers, 134,515,008 parameters, all of them trained |" in text
    assert "at the start" not in text


def test_a_start_that_is_not_the_base_is_told():
    results = {"name": "some", **json.loads(RESULTS.read_text())}
    results["start"] = {"val_loss": results["best"]["val_loss"] + 1, "val_ppl": 24.5}
    assert "of the base before, and -1.0000 nats against the 24.50 of the model at the start." in finetune_report(
        results
    )


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "30 layers, 134,515,008 parameters, all of them trained"),
        ({"trained_layers": 1}, "; trained: 4,884,480 of them, the last layer and the final norm"),
        ({"adapter": "lora", "rank": 16}, "; trained: 4,884,480 parameters of LoRA adapters, rank 16, on all layers"),
        ({"dropped_layers": [14, 20]}, "(layers 14 to 19 of the base left out), all of them trained"),
    ],
)
def test_the_model_in_words(config, told):
    assert told in model_text(config, COUNTS)
