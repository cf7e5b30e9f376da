"""`newllm generate` and `newllm report`: what they make of a run directory, or of what is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from newllm_jax.content import sealed

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


PROMPTS = ["", " ", "w1 w2", "Unheard-of words!", "-", "--", "-x", "--temperature?", "🦓 é", "\udcff", "w3 " * 200]


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_any_prompt_will_do(newllm, small_run, prompt):
    code, out, err = newllm("generate", small_run, "--prompt", prompt, "--max_words", "2")
    assert (code, err) == (0, "")
    assert prompt == "--" or out.startswith(prompt.replace("\udcff", "?"))
    assert out.endswith("\n")


@pytest.mark.quick
def test_generating_again(newllm, small_run):
    def words(*typed):
        code, out, err = newllm("generate", small_run, "--prompt", "w1", *typed)
        assert (code, err) == (0, "")
        return out.split()[1:]

    assert words("--max_words", "0") == []
    assert words("--seed", "3") == words("--seed", "3") != words("--seed", "4")
    assert words("--temperature", "0", "--seed", "3") == words("--temperature", "0", "--seed", "4")
    assert words("--top_k", "1") == words("--temperature", "0")
    assert "<UNK>" not in words("--temperature", "5", "--top_p", "1")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--max_words", "-1"], "max_words: must be from 0 to 1000000000, not -1"),
        (["--seed", "-1"], "seed: must be from 0 to 2147483647, not -1"),
        (["--prompts", "none.txt"], "none.txt: cannot be read (No such file or directory)"),
        (["--prompts", "."], ".: not a regular file"),
        (["--prompts", "none.txt", "--prompt", "w1"], "prompt: does not go with --prompts"),
        (["--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
        (["--precision", "bf16"], "precision: bf16 needs an NVIDIA GPU"),
    ],
)
def test_generating_nothing(refused, small_run, typed, message):
    assert message in refused("generate", small_run, *typed)


def test_a_reader_who_leaves_is_no_error(small_run):
    command = [sys.executable, "-m", "newllm_jax", "generate", str(small_run), "--max_words", "5000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_report_is_written_anew(newllm, refused, copy):
    report = (copy / "report.md").read_text()
    (copy / "report.md").unlink()
    page = (copy / "report.html").read_text()
    (copy / "curves.png").unlink()
    (copy / "report.html").unlink()
    code, out, err = newllm("report", copy)
    assert (code, out, err) == (0, report + "\n", "")
    assert (copy / "report.md").read_text() == report
    assert (copy / "curves.png").stat().st_size > 1000
    assert (copy / "report.html").read_text() == page

    (copy / "results.json").write_text(json.dumps(sealed({})))
    assert refused("report", copy).endswith("results.json: no results of a run")
    (copy / "results.json").unlink()
    assert refused("report", copy) == f"{copy}: has no results.json"


# Run directories that are none, or not yet


NO_RUN = {  # `train --resume` wants one system, `generate` takes any
    "other: not a new-llm run",
    "other/config.json: names no system that is known ('chess')",
}


def test_what_is_no_run_directory(refused, tmp_path, small_run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, content in {"damaged": '{"system": "new', "a list": "[]", "other": '{"system": "chess"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "changed").mkdir()
    stored = json.loads((small_run / "config.json").read_text())
    stored["config"]["batch_size"] = "many"
    (tmp_path / "changed" / "config.json").write_text(json.dumps(sealed(stored)))
    before = sorted(tmp_path.rglob("*"))
    for command in (["train", "--resume"], ["generate"]):
        assert refused(*command, "empty") == "empty: not a run directory (it has no config.json)"
        assert refused(*command, "file") == "file: not a run directory"
        assert "damaged/config.json: " in refused(*command, "damaged")
        assert refused(*command, "a list") == "a list/config.json: damaged (a JSON object is expected)"
        assert refused(*command, "other") in NO_RUN
        assert "changed/config.json: damaged (batch_size: 'many' is not an integer)" in refused(*command, "changed")
    assert {path for path in tmp_path.rglob("*") if path.name != ".lock"} == set(before)


@pytest.mark.quick
def test_a_run_without_a_checkpoint(refused, copy):
    shutil.rmtree(copy / "checkpoints")
    assert refused("generate", copy) == f"{copy}: has no checkpoint yet"
    (copy / "checkpoints").mkdir()
    assert refused("generate", copy) == f"{copy}: has no checkpoint yet"


def test_many_prompts_give_a_line_of_json_each(newllm, refused, small_run):
    Path("prompts.txt").write_bytes("\ufeffw1 w2\r\n\nw3 é".encode())
    code, out, err = newllm("generate", small_run, "--prompts", "prompts.txt", "--max_words", "5", "--seed", "2")
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    assert [each["prompt"] for each in found] == ["w1 w2", "", "w3 é"]
    for number, each in enumerate(found):
        _, alone, _ = newllm(
            "generate", small_run, "--prompt", each["prompt"], "--max_words", "5", "--seed", 2 + number
        )
        assert alone.split() == [*each["prompt"].split(), *each["text"].split()]
    assert "batch: must be from 1 to 4096, not 0" in refused(
        "generate", small_run, "--prompts", "prompts.txt", "--batch", "0"
    )
