"""The command line: every bad input is one line and exit code 2, and nothing is lost whatever stops a run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from newllm_jax import cli
from newllm_jax.report import run_dir
from newllm_jax.sources import text
from newllm_jax.sources.cache import whole_file
from newllm_jax.training import loop

CHECKOUT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def options(small):
    """The command of a run of a few seconds."""
    typed = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in small.items()}
    return ["train", "--config", "quickstart", *(f"--{name}={value}" for name, value in typed.items())]


@pytest.fixture
def copy(small_run, tmp_path):
    """A finished run that a test may change."""
    return Path(shutil.copytree(small_run, tmp_path / "copy"))


def epochs(run):
    return [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def only_run(root="runs"):
    (run,) = Path(root).iterdir()
    return run


# Bad input


@pytest.mark.quick
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--config", "advnced"], "config: no configuration 'advnced'; did you mean advanced?"),
        (["--config", "mine.toml"], "config: cannot read mine.toml (No such file or directory)"),
        (["--bach_size", "3"], "--bach_size: no such option; did you mean batch_size?"),
        (["--bach_size=3"], "--bach_size: no such option; did you mean batch_size?"),
        (["advanced"], "advanced: unexpected argument"),
        (["--num_epochs", "many"], "num_epochs: 'many' is not an integer"),
        (["--num_epochs", "2.5"], "num_epochs: '2.5' is not an integer"),
        (["--learning_rate", "fast"], "learning_rate: 'fast' is not a number"),
        (["--num_epochs"], "argument --num_epochs: expected one argument"),
        (["--num_epochs", "--seed", "1"], "argument --num_epochs: expected one argument"),
        (["--num_epochs", ""], "num_epochs: '' is not an integer"),
        (["--batch_size", "0"], "batch_size: must be at least 1, not 0"),
        (["--batch_size", "-1"], "batch_size: must be at least 1, not -1"),
        (["--learning_rate", "-1e-4"], "learning_rate: must be above 0 and finite, not -0.0001"),
        (["--learning_rate=-0.1"], "learning_rate: must be above 0 and finite, not -0.1"),
        (["--learning_rate", "-inf"], "learning_rate: must be above 0 and finite, not -inf"),
        (["--learning_rate", "nan"], "learning_rate: must be above 0 and finite, not nan"),
        (["--vocabulary_size", "4"], "vocabulary_size: must be 5 to 65536 (four special tokens and a word), not 4"),
        (["--schedule", "cosin"], "schedule: must be one of constant, cosine, not 'cosin'"),
        (["--precision", "float16"], "precision: must be one of auto, fp32, tf32, bf16, fp16, not 'float16'"),
        (["--precision", "tf32"], "precision: tf32 needs an NVIDIA GPU of compute capability 8.0 or newer, which cpu"),
        (["--precision", "bf16", "--dry_run"], "precision: bf16 needs an NVIDIA GPU of compute capability 8.0 or"),
        (["--precision", "fp16"], "precision: fp16 needs an NVIDIA GPU of compute capability 7.0 or newer, which cpu"),
        (["--fallback", "maybe"], "fallback: must be one of builtin, error, not 'maybe'"),
        (["--clip_norms", "1,x"], "clip_norms: '1,x' is not a list of numbers"),
        (["--dataset", "missing/folder/of/texts"], "dataset: 'missing/folder/of/texts' does not exist"),
        (["--dataset", "x" * 5000], "x: File name too long"),
        (["--dataset", "someone/texts", "--fallback", "error"], "dataset: dataset 'someone/texts' is not in the local"),
        (["--resume", "missing"], "missing: no such run directory"),
        (["--resume", "missing", "--dry_run"], "dry_run: does not go with --resume"),
        (["--tracker", "tensorbord"], "tracker: must be one of none, tensorboard, wandb, not 'tensorbord'"),
    ],
)
def test_bad_input_is_one_line(refused, tmp_path, typed, message):
    assert message in refused("train", *typed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["trian"], "trian: no such command; did you mean train?"),
        (["generate"], "the following arguments are required: run_dir"),
        (["generate", "missing"], "missing: no such run directory"),
        (["generate", "x", "--temperature", "-1"], "temperature: must be 0 or more, not -1.0"),
        (["generate", "x", "--temperature", "nan"], "temperature: must be 0 or more, not nan"),
        (["generate", "x", "--temperature", "inf"], "temperature: must be 0 or more, not inf"),
        (["generate", "x", "--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["generate", "x", "--top_k", "-1"], "top_k: must be 0 (all words) or more, not -1"),
        (["generate", "x", "--top_p", "0"], "top_p: must be above 0 and at most 1, not 0.0"),
        (["generate", "x", "--top_p", "1.5"], "top_p: must be above 0 and at most 1, not 1.5"),
        (["generate", "x", "--promt", "hello"], "--promt: no such option; did you mean prompt?"),
        (["report"], "the following arguments are required: run_dir"),
        (["report", "missing"], "missing: no such run directory"),
        (["doctor", "please"], "please: unexpected argument"),
    ],
)
def test_bad_commands_are_one_line(refused, typed, message):
    assert message in refused(*typed)


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


def python(*argv, **options):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--config", "advnced"], "error: config: no configuration 'advnced'; did you mean advanced?\n"),
        (["--config", "mine.toml"], "error: config: cannot read mine.toml (No such file or directory)\n"),
    ],
)
def test_bad_input_of_a_real_command(tmp_path, typed, message):
    ran = python(CHECKOUT / "train.py", *typed)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", message)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    ran = python(CHECKOUT / "train.py", "--batch_size", "0", "--debug")
    assert "Traceback" in ran.stderr and "InputError: batch_size: must be at least 1" in ran.stderr


def test_a_bug_keeps_its_traceback(newllm, monkeypatch):
    def bug(*_):
        raise KeyError("of ours")

    monkeypatch.setitem(cli.COMMANDS, "train", bug)
    with pytest.raises(KeyError, match="of ours"):
        newllm("train")


# Help, and what the commands print


@pytest.mark.quick
@pytest.mark.parametrize("typed", [[], ["--help"], ["-h"]])
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
def test_dry_run_is_json_and_makes_no_run(newllm, options, tmp_path):
    code, out, err = newllm(*options, "--dry_run")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert (plan["config"]["clip_norms"], plan["config"]["clip_epochs"]) == ([0.01, 0.1, 1.0], [1, 3])
    assert plan["config"]["hidden_dim"] == 16
    assert plan["updates"] == 2 * plan["updates_per_epoch"] > 0
    assert plan["estimated_memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick
def test_doctor(newllm):
    code, out, err = newllm("doctor")
    found = json.loads(out)
    assert (code, err, found["hub"]) == (0, "", False)
    assert {"python", "jax", "platform", "precision", "cache"} <= set(found)
    assert (found["precision"], found["precisions"]) == ("fp32", ["fp32"])


@pytest.mark.quick
def test_a_run_prints_what_it_resolved(newllm, options):
    code, out, err = newllm(*options)
    assert (code, err) == (0, "")
    run = only_run()
    for line in (
        "device      cpu",
        "data        ",
        "parameters  ",
        f"run         {run}",
        f"report      {run}/report.md",
    ):
        assert f"\n{line}" in f"\n{out}"
    assert out.count("val PPL") == 2
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "config.json", "vocabulary.json", "metrics.jsonl", "results.json", "report.md", "curves.png", "checkpoints",
    }  # fmt: skip


def test_a_fallback_is_boxed_and_in_the_runs_name(newllm, options, corpus, monkeypatch):
    # The same lines as the corpus, so that nothing is compiled anew.
    monkeypatch.setattr(text, "builtin_topics", lambda: {"all": corpus.read_text().replace("\n", "\n\n")})
    code, out, err = newllm(*options, "--dataset", "someone/texts", "--num_epochs=1")
    assert (code, err) == (0, "")
    assert out.startswith("+---") and "someone/texts" in out and "cannot be compared with published ones" in out
    assert "-builtin-" in only_run().name
    assert "**Not the data that was asked for.**" in (only_run() / "report.md").read_text()


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
        (["--max_words", "-1"], "max_words: must be 0 or more, not -1"),
        (["--seed", "-1"], "seed: must be from 0 to 2147483647, not -1"),
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
    (copy / "curves.png").unlink()
    code, out, err = newllm("report", copy)
    assert (code, out, err) == (0, report + "\n", "")
    assert (copy / "report.md").read_text() == report
    assert (copy / "curves.png").stat().st_size > 1000

    (copy / "results.json").write_text("{}")
    assert "results.json: damaged (KeyError('system'))" in refused("report", copy)
    (copy / "results.json").unlink()
    assert refused("report", copy) == f"{copy}: has no results.json"


# Run directories that are none, and resuming that contradicts


NO_RUN = {  # `train --resume` wants one system, `generate` takes any
    "of a list: not a new-llm run",
    "other: not a new-llm run",
    "of a list/config.json: names no system that is known (None)",
    "other/config.json: names no system that is known ('chess')",
}


def test_what_is_no_run_directory(refused, tmp_path, small_run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, content in {"damaged": '{"system": "new', "of a list": "[]", "other": '{"system": "chess"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "changed").mkdir()
    stored = json.loads((small_run / "config.json").read_text())
    stored["config"]["batch_size"] = "many"
    (tmp_path / "changed" / "config.json").write_text(json.dumps(stored))
    before = sorted(tmp_path.rglob("*"))
    for command in (["train", "--resume"], ["generate"]):
        assert refused(*command, "empty") == "empty: not a run directory (it has no config.json)"
        assert refused(*command, "file") == "file: no such run directory"
        assert "damaged/config.json: damaged (" in refused(*command, "damaged")
        assert refused(*command, "of a list") in NO_RUN
        assert refused(*command, "other") in NO_RUN
        assert "changed/config.json: damaged (batch_size: 'many' is not an integer)" in refused(*command, "changed")
    assert {path for path in tmp_path.rglob("*") if path.name != ".lock"} == set(before)


@pytest.mark.quick
def test_a_run_without_a_checkpoint(refused, copy):
    shutil.rmtree(copy / "checkpoints")
    assert refused("generate", copy) == f"{copy}: has no checkpoint yet"
    (copy / "checkpoints").mkdir()
    assert refused("generate", copy) == f"{copy}/checkpoints: no checkpoint that can be read"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--batch_size", "8"], "batch_size: copy was trained with 32, not 8; a new run can have that"),
        (["--learning_rate", "1e-4"], "learning_rate: copy was trained with "),
        (["--config", "advanced"], "was trained with"),
        (["--seed", "1"], "seed: copy was trained with 0, not 1"),
        (["--precision", "fp16"], "precision: copy was trained with 'auto', not 'fp16'; a new run can have that"),
    ],
)
def test_resuming_cannot_make_it_another_experiment(refused, copy, typed, message):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert message in refused("train", "--resume", "copy", *typed)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_resuming_on_other_texts_is_refused(refused, copy, tmp_path, corpus):
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text().replace("w1 ", "w2 "))
    line = refused("train", "--resume", copy, "--dataset", other, "--num_epochs", "3")
    assert f"dataset: {other} is not what the run was trained on" in line
    assert epochs(copy) == [1, 2]


def test_resuming_a_finished_run_says_what_would_let_it_go_on(newllm, copy):
    code, out, err = newllm("train", "--resume", copy)
    assert (code, err) == (0, "")
    assert "finished after epoch 2, the last of num_epochs (raise it to go on)" in out


# What stops a run, and going on after it


@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_and_a_run_in_use(refused, newllm, options, sent, code, word):
    forever = ["--num_epochs", "100000", "--patience", "100000", "--checkpoint_every", "100000"]
    command = [sys.executable, str(CHECKOUT / "train.py"), *options[1:], *forever]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                break
        run = only_run()
        assert refused("train", "--resume", run) == f"{run}: in use by another running process"
        assert refused("report", run) == f"{run}: has no results.json"
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (code, 1), err
    assert err == f"error: {word}; --resume RUN_DIR goes on after the last whole epoch\n"

    done = max(int(name.name.split("_")[1]) for name in (run / "checkpoints").iterdir())
    assert done >= 1
    code, out, err = newllm("train", "--resume", run, "--num_epochs", done + 1)
    assert (code, err) == (0, "")
    assert f"going on after epoch {done}" in out
    assert epochs(run) == list(range(1, done + 2))


def test_numbers_that_fail(refused, newllm, options):
    line = refused(*options, "--learning_rate", "1e30", "--run_root", "first", code=3)
    assert line.startswith("epoch 1: a loss or gradient is not finite in updates ")
    assert line.endswith("; there is no checkpoint yet; try a lower learning_rate")

    evaluate, calls = loop.evaluate, []

    def fails_the_second_time(*arguments):
        calls.append(arguments)
        return {"loss": float("nan")} if len(calls) == 2 else evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", fails_the_second_time)
        line = refused(*options, code=3)
    assert line.startswith("epoch 2: the validation loss is not finite; the checkpoint of epoch 1 is kept")
    run = only_run()
    assert epochs(run) == [1]
    assert newllm("train", "--resume", run)[0] == 0
    assert epochs(run) == [1, 2]


def fail_file(name):
    @contextmanager
    def full(path):
        with whole_file(path) as partial:
            yield partial
            if path.name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda patch: patch.setattr(run_dir, "whole_file", full)


def fail_metrics(patch):
    append = run_dir.RunDir.append_metrics

    def full(self, entry):
        if entry["epoch"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / "metrics.jsonl"))
        append(self, entry)

    patch.setattr(run_dir.RunDir, "append_metrics", full)


def fail_room(patch):
    room = iter([shutil.disk_usage("/"), shutil.disk_usage("/")._replace(free=1000)])
    patch.setattr("newllm_jax.training.checkpoint.shutil.disk_usage", lambda _: next(room))


def fail_orbax(method, times):
    def patched(patch):
        original, calls = getattr(ocp.CheckpointManager, method), []

        def full(self, *arguments, **named):
            calls.append(arguments)
            if len(calls) == times:
                raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")
            return original(self, *arguments, **named)

        patch.setattr(ocp.CheckpointManager, method, full)

    return patched


FULL_DISKS = {
    "results": (fail_file("results.json"), "results.json: No space left on device; make room or choose another"),
    "metrics": (fail_metrics, "metrics.jsonl: No space left on device; make room or choose another place (what was"),
    "room": (
        fail_room,
        "checkpoints: no room for the checkpoint of epoch 2 (0.0 MB needed, 0.0 MB free); make room and",
    ),
    "save": (fail_orbax("save", 2), "checkpoints: No space left on device; the checkpoints up to epoch 1 are whole;"),
    "wait": (fail_orbax("wait_until_finished", 3), "checkpoints: No space left on device; the checkpoints up to"),
}


@pytest.mark.parametrize("place", FULL_DISKS)
def test_a_full_disk_and_going_on_when_there_is_room(refused, newllm, options, small_run, place):
    fill_disk, message = FULL_DISKS[place]
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        assert message in refused(*options)
    run = only_run()
    assert epochs(run) in ([1], [1, 2])
    assert not (run / "results.json").exists()
    code, _, err = newllm("train", "--resume", run)
    assert (code, err) == (0, "")
    ours, whole = (json.loads((path / "results.json").read_text()) for path in (run, small_run))
    assert epochs(run) == [1, 2]
    assert ours["test"] == whole["test"]  # as if the disk had never been full


def test_a_disk_that_takes_nothing_leaves_nothing(refused, options, monkeypatch, tmp_path):
    fail_file("config.json")(monkeypatch)
    assert "config.json: No space left on device" in refused(*options)
    assert list((tmp_path / "runs").iterdir()) == []

    def read_only(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    line = refused(*options, "--run_root", "elsewhere")
    assert line.startswith("elsewhere/quickstart-") and ": Read-only file system; make room or choose another" in line


def test_a_tracker_that_is_not_installed_leaves_nothing(refused, options, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert (
        refused(*options, "--tracker", "tensorboard") == "tracker: tensorboard needs the extra newllm-jax[tensorboard]"
    )
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_root_that_is_a_file(refused, options, tmp_path):
    (tmp_path / "file").write_text("")
    assert ": Not a directory" in refused(*options, "--run_root", "file")
