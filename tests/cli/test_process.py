"""The command line: every bad input is one line and exit code 2, and a bug keeps its traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from newllm_jax.cli import process as cli
from newllm_jax.cli.options import deterministic_flags

CHECKOUT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            [],
            "usage: newllm COMMAND ..., one of train, cascade, finetune, sweep, generate, evaluate, ",
        ),
        (["trian"], "trian: no such command; did you mean train?"),
        ([""], "'': no such command; there are: "),
        (["doctor", " "], "' ': unexpected argument"),
        (["generate", "x", "--seed", "9" * 5000], "argument --seed: invalid int value: '99999"),
        (["generate"], "the following arguments are required: RUN_DIR"),
        (["generate", "missing"], "missing: no such run directory"),
        (["generate", "x", "--temperature", "-1"], "temperature: must be from 0 to 1000, not -1.0"),
        (["generate", "x", "--temperature", "nan"], "temperature: must be from 0 to 1000, not nan"),
        (["generate", "x", "--temperature", "inf"], "temperature: must be from 0 to 1000, not inf"),
        (["generate", "x", "--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["generate", "x", "--top_k", "-1"], "top_k: must be from 0 to 1000000000, not -1"),
        (["generate", "x", "--top_p", "0"], "top_p: must be from 1e-30 to 1, not 0.0"),
        (["generate", "x", "--top_p", "1.5"], "top_p: must be from 1e-30 to 1, not 1.5"),
        (["generate", "x", "--promt", "hello"], "--promt: no such option; did you mean prompt?"),
        (["report"], "the following arguments are required: RUN_DIR"),
        (["report", "missing"], "missing: no such run directory"),
        (["doctor", "please"], "please: unexpected argument"),
    ],
)
def test_bad_commands_are_one_line(refused, typed, message):
    assert message in refused(*typed)


def python(*argv, **options):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--config", "advnced"], "error: config: no configuration 'advnced'; did you mean advanced?\n"),
        (["--config", "mine.toml"], "error: mine.toml: cannot be read (No such file or directory)\n"),
    ],
)
def test_bad_input_of_a_real_command(tmp_path, typed, message):
    ran = python(CHECKOUT / "train.py", *typed)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", message)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    ran = python(CHECKOUT / "train.py", "--batch_size", "0", "--debug")
    assert "Traceback" in ran.stderr and "InputError: batch_size: must be from 1 to" in ran.stderr


@pytest.mark.parametrize("command", ["train", "cascade", "finetune", "generate", "evaluate"])
def test_deterministic_tells_xla(refused, monkeypatch, command):
    resume = ["--resume"] if command in ("train", "cascade", "finetune") else []
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    refused(command, *resume, "missing")
    assert os.environ["XLA_FLAGS"] == "--xla_of_the_user=1"
    refused(command, *resume, "missing", "--deterministic")
    assert os.environ["XLA_FLAGS"] == f"--xla_of_the_user=1 {deterministic_flags()}"


@pytest.mark.quick
def test_this_xla_knows_the_flags_of_deterministic():
    ran = python("-c", "import jax; jax.devices()", env={**os.environ, "XLA_FLAGS": deterministic_flags()})
    assert (ran.returncode, ran.stderr) == (0, "")


def test_an_xla_that_adds_rows_up_wrongly_does_so_one_by_one(monkeypatch):
    for version, wrong in (("0.7.2", True), ("0.9.3", True), ("0.10.0", False), ("0.12.0.1", False), ("1.0", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda _, version=version: version)
        assert ("scatter_determinism_expander=false" in deterministic_flags()) == wrong


def test_memory_that_runs_out_says_what_to_do(refused, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setitem(cli.COMMANDS, "finetune", full)
    assert re.fullmatch(
        r"out of memory of the host: more asked for, \d+\.\d\d GiB are free; lower micro_batch \(a new run finds it "
        r"with --auto_batch\), or use a smaller base_model", refused("finetune")
    )  # fmt: skip
    monkeypatch.setitem(cli.COMMANDS, "generate", full)
    assert refused("generate").endswith("; close what else needs memory, or use a CPU (JAX_PLATFORMS=cpu)")


def test_a_bug_keeps_its_traceback(newllm, monkeypatch):
    def bug(*_):
        raise KeyError("of ours")

    monkeypatch.setitem(cli.COMMANDS, "train", bug)
    with pytest.raises(KeyError, match="of ours"):
        newllm("train")


@pytest.mark.quick
@pytest.mark.parametrize("typed", [["--help"], ["-h"]])
def test_help_lists_the_commands(newllm, typed):
    code, out, err = newllm(*typed)
    assert (code, err) == (0, "")
    assert all(f"newllm {name}" in out for name in cli.COMMANDS)


@pytest.mark.quick
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(newllm, capsys, command):
    with pytest.raises(SystemExit) as left:
        newllm(command, "--help")
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: ")
    assert command != "train" or all(word in out for word in ("--learning_rate", "peak learning rate", "--resume"))


@pytest.mark.quick
def test_doctor(newllm):
    code, out, err = newllm("doctor", "--json")
    found = json.loads(out)
    assert (code, err, found["hub"]) == (0, "", False)
    assert {"python", "jax", "platform", "precision", "cache"} <= set(found)
    assert (found["precision"], found["precisions"]) == (
        dict.fromkeys(["train", "cascade", "finetune"], "fp32"),
        ["fp32"],
    )
    assert found["warnings"] == []  # a CPU has no kernels to lose
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["device"] == "ok"
    assert states["Hub"] == "warn"  # the tests ask for no network
    assert "mend: unset HF_HUB_OFFLINE" in newllm("doctor")[1]
