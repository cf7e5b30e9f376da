"""The fingerprints of what a run reads, and results that are those of the run as it is."""

from __future__ import annotations

import json

import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir
from newllm_jax.records.results import Fingerprint, check_fingerprints, describe_run, finished_results

NOW = (Fingerprint("data", "dataset: texts", "a" * 64), Fingerprint("base", "base_model: llama", "b" * 64))


@pytest.fixture
def run(tmp_path):
    with RunDir.create(tmp_path, "run") as run:
        run.begin(describe_run(NewLLMConfig(seed=3), "fp32", NOW))
        yield run


def test_config_json_has_the_settings_and_the_fingerprints(run):
    stored = RunDir.open(run.path).description
    assert stored["system"] == "new-llm"
    assert NewLLMConfig.from_dict(stored["config"]).seed == 3
    assert stored["fingerprints"] == {"data": "a" * 64, "base": "b" * 64}


def test_another_source_is_refused_by_name(run):
    check_fingerprints(run, NOW)
    other = Fingerprint("base", "base_model: llama", "c" * 64)
    with pytest.raises(InputError, match=r"base_model: llama is not .* \(fingerprint bbbbbbbbbbbb, now cccccccccccc\)"):
        check_fingerprints(run, (NOW[0], other))


def test_older_runs_bring_their_own_fingerprints(run):
    del run.description["fingerprints"]
    check_fingerprints(run, NOW)  # nothing is known
    with pytest.raises(InputError, match="dataset: texts is not what the run was trained on"):
        check_fingerprints(run, NOW, {"data": "d" * 64})


@pytest.mark.parametrize("damage", ["x", {"data": 5}, ["a"]])
def test_damaged_fingerprints_are_told(run, damage):
    run.description["fingerprints"] = damage
    with pytest.raises(InputError, match=r"config.json: damaged \(fingerprints"):
        check_fingerprints(run, NOW)


def test_results_of_fewer_epochs_are_not_those_of_the_run(run):
    assert finished_results(run, "epochs", 1) is None
    run.write_json("results.json", {"run_id": run.run_id, "epochs": [{}, {}]})
    assert finished_results(run, "epochs", 2) == json.loads((run.path / "results.json").read_text())
    assert finished_results(run, "epochs", 3) is None
