"""`newllm train`: what it refuses, and what it prints and leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import newllm_jax
from newllm_jax.cli import training
from newllm_jax.sources import text

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# Bad input


@pytest.mark.quick
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--config", "advnced"], "config: no configuration 'advnced'; did you mean advanced?"),
        (["--config", "mine.toml"], "mine.toml: cannot be read (No such file or directory)"),
        (["--bach_size", "3"], "--bach_size: no such option; did you mean batch_size?"),
        (["--bach_size=3"], "--bach_size: no such option; did you mean batch_size?"),
        (["advanced"], "advanced: unexpected argument"),
        (["--num_epochs", "many"], "num_epochs: 'many' is not an integer"),
        (["--num_epochs", "2.5"], "num_epochs: '2.5' is not an integer"),
        (["--learning_rate", "fast"], "learning_rate: 'fast' is not a number"),
        (["--num_epochs"], "argument --num_epochs: expected one argument"),
        (["--num_epochs", "--seed", "1"], "argument --num_epochs: expected one argument"),
        (["--num_epochs", ""], "num_epochs: '' is not an integer"),
        (["--batch_size", "0"], "batch_size: must be from 1 to 1048576, not 0"),
        (["--batch_size", "-1"], "batch_size: must be from 1 to 1048576, not -1"),
        (["--learning_rate", "-1e-4"], "learning_rate: must be above 0 and at most 1e+30, not -0.0001"),
        (["--learning_rate=-0.1"], "learning_rate: must be above 0 and at most 1e+30, not -0.1"),
        (["--learning_rate", "-inf"], "learning_rate: must be above 0 and at most 1e+30, not -inf"),
        (["--learning_rate", "nan"], "learning_rate: must be above 0 and at most 1e+30, not nan"),
        (["--vocabulary_size", "4"], "vocabulary_size: must be from 5 to 65536, not 4"),
        (["--schedule", "cosin"], "schedule: must be one of constant, cosine, not 'cosin'"),
        (["--precision", "float16"], "precision: must be one of auto, fp32, tf32, bf16, fp16, not 'float16'"),
        (["--precision", "tf32"], "precision: tf32 needs an NVIDIA GPU of compute capability 8.0 or newer, which cpu"),
        (["--precision", "bf16", "--dry_run"], "precision: bf16 needs an NVIDIA GPU of compute capability 8.0 or"),
        (["--precision", "fp16"], "precision: fp16 needs an NVIDIA GPU of compute capability 7.0 or newer, which cpu"),
        (["--fallback", "maybe"], "fallback: must be one of builtin, error, not 'maybe'"),
        (["--clip_norms", "1,x"], "clip_norms: '1,x' is not a list of numbers"),
        (["--dataset", "missing/folder/of/texts"], "dataset: 'missing/folder/of/texts' does not exist"),
        (["--dataset", "x" * 4000], "x: File name too long"),
        (["--dataset", "x" * 5000], "dataset: must be a text of 1 to 4096 characters, not 'xxx"),
        (["--dataset", "someone/texts", "--fallback", "error"], "dataset: dataset 'someone/texts' is not in the local"),
        (["--resume", "missing"], "missing: no such run directory"),
        (["--resume", "missing", "--dry_run"], "dry_run: does not go with --resume"),
        (["--resume", "missing", "--auto_batch"], "auto_batch: does not go with --resume"),
        (["--auto_batch", "--micro_batch", "8"], "auto_batch: does not go with micro_batch, which it chooses"),
        (["--micro_batch", "33"], "micro_batch: must be at most batch_size (32), or none, not 33"),
        (["--tracker", "tensorbord"], "tracker: must be one of none, tensorboard, wandb, trackio, not 'tensorbord'"),
    ],
)
def test_bad_input_is_one_line(refused, tmp_path, typed, message):
    assert message in refused("train", *typed)
    assert list(tmp_path.iterdir()) == []


DATA_FAULTS = {
    "empty folder": ({}, "has no data files"),
    "empty file": ({"train.txt": ""}, "train.txt is empty"),
    "no text column": ({"train.csv": "words\na b c\n"}, "has no column 'text' (it has words)"),
    "numbers": ({"train.csv": "text\n1\n2\n"}, "holds int, not text"),
    "not UTF-8": ({"train.txt": b"na\xefve\n"}, "train.txt is not UTF-8 (byte 0xef at 2)"),
    "all blank": ({"train.txt": "\n  \n\t\n"}, "has no words in its train split"),
    "no sequence": ({"train.txt": "too few words\n" * 9}, "split of {} gives no sequence (no text of 5 words or more)"),
    "no train split": ({"test.txt": "a b c d e f\n"}, "has no train split (it has test)"),
    "damaged": ({"train.parquet": "PAR"}, "cannot be read ("),
}


@pytest.mark.quick
@pytest.mark.parametrize("fault", DATA_FAULTS)
@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]], ids=["train", "dry_run"])
def test_faults_of_a_data_set(refused, tmp_path, fault, dry_run):
    files, message = DATA_FAULTS[fault]
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("train", "--dataset", folder, *dry_run)
    assert line.startswith("dataset: ") and str(folder) in line
    assert message.format(folder) in line
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.quick
def test_several_configurations_are_listed(refused, tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n" + "".join(f"- config_name: {n}\n  data_files: {n}/*\n" for n in "ab") + "---\n"
    )
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text("a b c d e f\n")
    assert refused("train", "--dataset", tmp_path).endswith("has several configurations, name one of: a, b")
    assert "has no configuration 'c'" in refused("train", "--dataset", tmp_path, "--dataset_config", "c")


def test_nothing_is_imported_from_the_current_folder(hostile_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a few words"}\n')
    program = Path(newllm_jax.__file__).parent.parent / "train.py"
    command = [sys.executable, program, "--dataset", tmp_path / "rows.jsonl", "--dry_run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["NEWLLM_CACHE"] = str(tmp_path / "cache")
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1) and "rows.jsonl has no words" in ran.stderr
    assert not hostile_folder.exists()
    subprocess.run([sys.executable, "-c", "import json"], check=True)
    assert hostile_folder.read_text() == "json"  # where the current folder has a say


def test_a_tracker_that_is_not_installed_leaves_nothing(refused, options, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert (
        refused(*options, "--tracker", "tensorboard") == "tracker: tensorboard needs the extra newllm-jax[tensorboard]"
    )
    assert not (tmp_path / "runs").exists()


def test_a_run_root_that_is_a_file(refused, options, tmp_path):
    (tmp_path / "file").write_text("")
    assert ": Not a directory" in refused(*options, "--run_root", "file")


# What it prints and leaves


@pytest.mark.quick
def test_dry_run_is_json_and_makes_no_run(newllm, options, tmp_path):
    code, out, err = newllm(*options, "--dry_run")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert (plan["config"]["clip_norms"], plan["config"]["clip_epochs"]) == ([0.01, 0.1, 1.0], [1, 3])
    assert plan["config"]["hidden_dim"] == 16
    assert plan["updates"] == 2 * plan["updates_per_epoch"] > 0
    assert plan["estimated_memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_auto_batch_goes_into_the_configuration(newllm, options, monkeypatch):
    memory = {32: 900, 16: 500, 8: 300}

    def plan(config):
        return {"estimated_memory_bytes": memory[config.examples_at_once], "config": config.to_dict()}

    monkeypatch.setattr("newllm_jax.newllm.plan.plan_newllm", plan)
    for usable, expected in ((1000, None), (400, 8)):
        monkeypatch.setattr("newllm_jax.cli.micro_batch.usable_memory", lambda usable=usable: usable)
        code, out, err = newllm(*options, "--auto_batch", "--dry_run")
        assert (code, err, json.loads(out)["config"]["micro_batch"]) == (0, "", expected)


@pytest.mark.quick
def test_a_run_prints_what_it_resolved(newllm, only_run, options):
    code, out, err = newllm(*options)
    assert (code, err) == (0, "")
    run = only_run()
    for line in (
        "device      cpu",
        "data        ",
        "parameters  ",
        f"run         {run}",
        f"report      {run}/report.html",
    ):
        assert f"\n{line}" in f"\n{out}"
    assert out.count("val PPL") == 2
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "config.json", "vocabulary.json", "metrics.jsonl", "results.json", "report.md", "report.html", "curves.png",
        "checkpoints",
    }  # fmt: skip


def test_a_fallback_is_boxed_and_in_the_runs_name(newllm, only_run, options, corpus, monkeypatch):
    # The same lines as the corpus, so that nothing is compiled anew.
    monkeypatch.setattr(text, "builtin_topics", lambda: {"all": corpus.read_text().replace("\n", "\n\n")})
    code, out, err = newllm(*options, "--dataset", "someone/texts", "--num_epochs=1")
    assert (code, err) == (0, "")
    assert out.startswith("+---") and "someone/texts" in out and "cannot be compared with published ones" in out
    assert "-builtin-" in only_run().name
    assert "**Not the data that was asked for.**" in (only_run() / "report.md").read_text()


def test_what_to_do_next_can_be_typed_where_the_shell_does_not_find_newllm(monkeypatch, tmp_path):
    installed = tmp_path / "bin" / "newllm"
    installed.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(installed.with_name("python")))
    assert training._within_reach("newllm report newllm") == "newllm report newllm"  # not installed there either
    installed.touch(mode=0o755)
    assert training._within_reach("newllm report newllm") == "bin/newllm report newllm"
    monkeypatch.setenv("PATH", str(installed.parent))
    assert training._within_reach("newllm report newllm") == "newllm report newllm"
