"""`newllm hardness`: what it refuses, what it prints and writes. Runs with gains: tests/cascade/test_criteria.py."""

from __future__ import annotations

import json

import pytest

from newllm_jax.config import CascadeConfig, FinetuneConfig
from newllm_jax.records.directory import RunDir
from newllm_jax.records.results import describe_run

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def begun(tmp_path):
    """Makes the directory of a run that has begun, and trained nothing."""

    def begin(config):
        with RunDir.create(tmp_path / "begun", config.system) as run:
            run.begin(describe_run(config, "fp32", ()))
        return run.path

    return begin


@pytest.mark.quick
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["missing"], "missing: no such run directory"),
        (["--hard_ratio", "1"], "hard_ratio: must be above 0 and below 1, not 1.0"),
        (["--hard_ratoi", "0.5"], "--hard_ratoi: no such option; did you mean hard_ratio?"),
        (["--num_epochs", "2"], "--num_epochs: no such option"),
        (["--train_chunks", "0"], "train_chunks: must be from 1 to 100000000, not 0"),
        (["--fallback", "none"], "fallback: must be one of builtin, error, not 'none'"),
        (["--base_model", "missing/folder/x"], "base_model: missing/folder/x does not exist"),
        (["one", "two"], "two: unexpected argument"),
        (["--output", "."], "output: must be a file or a new name, not '.'"),
    ],
)
def test_bad_input(refused, typed, message, tmp_path):
    bounded = ["--base_model=missing/folder/x"] if typed[0] in ("--num_epochs", "--output") else []
    assert refused("hardness", *typed, *bounded).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick
def test_runs_without_gains(refused, begun):
    wanted = "give a cascade run with another design (entry_layer or skipped_layers, for instance), or no run"
    tuned, published = begun(FinetuneConfig()), begun(CascadeConfig())
    assert refused("hardness", tuned) == f"{tuned}: is a run of 'finetune'; {wanted}"
    assert refused("hardness", published) == f"{published}: is a cascade run of the published design; {wanted}"


def test_a_design_run_that_is_not_finished(refused, begun, tiny_base):
    run = begun(CascadeConfig(base_model=tiny_base, num_stages=1, entry_layer=1))
    assert str(run) in refused("hardness", run)


def test_what_it_prints_and_writes(newllm, tiny, tmp_path):
    sources = [f"--base_model={tiny.base_model}", f"--dataset={tiny.dataset}"]
    counts = ["--train_chunks", 8, "--validation_chunks", 5]
    code, out, err = newllm("hardness", *sources, *counts, "--hard_ratio", 0.5)
    assert (code, err) == (0, "")
    assert "base        " in out and "2 layers" in out
    assert "PPL of the hard 50%" in out
    assert "trained to predict the loss, on 8 chunks" in out
    assert list(tmp_path.iterdir()) == []
    code, again, err = newllm("hardness", *sources, *counts, "--hard_ratio", 0.5, "--output", "hardness.json")
    assert (code, err) == (0, "")
    assert again == f"{out}\nwritten to hardness.json\n"
    results = json.loads((tmp_path / "hardness.json").read_text())
    assert results["run"] is None
    assert len(results["criteria"]) == 7
