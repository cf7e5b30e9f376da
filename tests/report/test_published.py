"""The published curve stands beside a run only where the run has its settings and its texts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from newllm_jax.report.published import newllm_figures, published_curve

pytestmark = pytest.mark.quick
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["baseline", "advanced"])
def test_committed_runs_have_their_curve(name):
    curve = published_curve(read(f"newllm/{name}-seed1"))
    assert curve is not None and curve.name == name
    figures = newllm_figures()[name]
    assert curve.ppl[max(curve.ppl)] == figures["best_val_ppl"]["value"]
    assert f"`{name}` ({figures['device']})" in curve.told


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("config", {"hidden_dim": 256}),
        ("config", {"cell": "residual"}),
        ("config", {"learning_rate": 3e-4}),
        ("config", {"batch_size": 64}),
        ("config", {"vocabulary_size": 2000}),
        ("config", {"of_another_version": 1}),
        ("data", {"vocabulary_size": 999}),
        ("data", {"fallback": "the Hub is away"}),
        ("data", {"source": "texts.txt"}),
        ("data", {"source": "Salesforce/wikitext (wikitext-103-raw-v1)"}),
    ],
)
def test_other_settings_or_texts_have_none(part, changed):
    results = read("newllm/baseline-seed1")
    other = copy.deepcopy(results)
    other[part] |= changed
    assert published_curve(results) and published_curve(other) is None


@pytest.mark.parametrize(
    "changed", [{"seed": 9}, {"num_epochs": 3}, {"micro_batch": 8}, {"sample_words": 0}, {"precision": "fp32"}]
)
def test_what_the_curve_does_not_depend_on(changed):
    results = read("newllm/baseline-seed1")
    results["config"] |= changed
    results["data"]["source"] = "Salesforce/wikitext (wikitext-2-raw-v1)"
    assert published_curve(results)


def test_other_systems_have_none():
    assert published_curve(read("quickstart/cascade")) is None
    assert published_curve(read("quickstart/newllm")) is None
