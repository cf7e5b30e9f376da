"""Run directories: names of their own, one process at a time, files that are whole."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import pytest

from newllm_jax.content import json_sha256, sealed
from newllm_jax.errors import InputError, Note
from newllm_jax.records import directory
from newllm_jax.records.directory import RunDir


def test_names_never_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20300101-000000")
    runs = [RunDir.create(tmp_path / "runs", "mine").path.name for _ in range(3)]
    assert runs == ["mine-20300101-000000", "mine-20300101-000000-2", "mine-20300101-000000-3"]


@pytest.mark.parametrize("name", ["", ".", "../x", "/x", "a/b", "a/", "a\0b", "a\nb", "\udcff", "ü" * 101, 5, None])
def test_names_lead_nowhere_else(tmp_path, name):
    with pytest.raises(InputError, match="name: "):
        RunDir.create(tmp_path / "runs", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", "a\0b", "a\nb", "\udcff", "a" * 256, "a/" * 3000, 5, None, b"runs"])
def test_paths_that_cannot_be(in_an_empty_folder, tmp_path, path):
    with pytest.raises(InputError, match="run_root: "):
        RunDir.create(path, "mine")
    with pytest.raises(InputError, match="run_dir: "):
        RunDir.open(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["checkpoints", ".lock", "metrics.jsonl", "extraction/train-000000.npz"])
def test_nothing_is_written_through_a_link(tmp_path, inside):
    with RunDir.create(tmp_path, "mine") as run:
        run.write_json("config.json", {})
    link = run.path / inside
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{inside}: is a link, and a run writes into its own"), RunDir.open(run.path):
        pass
    link.rename(run.path.parent / "outside")
    (run.path / "wandb").mkdir()
    (run.path / "wandb" / "latest-run").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(run.path)
    with RunDir.open(tmp_path / "alias"):  # the directory itself may have another name
        pass


def test_one_process_at_a_time(tmp_path):
    run = RunDir.create(tmp_path, "mine")
    run.begin({})
    hold = (
        "import sys; from newllm_jax.records.directory import RunDir\n"
        "with RunDir.open(sys.argv[1]): print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(InputError, match="in use by another running process"), RunDir.open(run.path):
            pass
        other.kill()  # a process that dies without a word leaves no lock behind
        other.wait()
        with RunDir.open(run.path):
            pass
    with RunDir.open(run.path):
        pass


def test_a_new_directory_that_never_was_a_run_vanishes(tmp_path):
    with pytest.raises(KeyError), RunDir.create(tmp_path, "mine") as run:
        run.write_text("vocabulary.json", "[]")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), RunDir.create(tmp_path, "mine") as run:
        run.begin({})
        raise KeyError
    assert list(tmp_path.iterdir()) == [run.path]
    with RunDir.open(run.path):
        (run.path / "config.json").unlink()  # whoever did that, the checkpoints are not ours to delete
    assert list(tmp_path.iterdir()) == [run.path]


def test_json_has_no_infinity(tmp_path):
    run = RunDir.create(tmp_path, "mine")
    run.write_json("results.json", {"val_ppl": math.inf, "all": [math.nan, (1.5, -math.inf)], "né": 1})
    assert "Infinity" not in (run.path / "results.json").read_text()
    assert run.read_json("results.json") == sealed({"val_ppl": None, "all": [None, [1.5, None]], "né": 1})


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    run = RunDir.create(tmp_path, "mine")
    with pytest.raises(InputError, match=r"has no results\.json"):
        run.read_json("results.json")
    for content in (b'{"half', b"\xff"):
        (run.path / "results.json").write_bytes(content)
        with pytest.raises(InputError, match=r"results\.json: "):
            run.read_json("results.json")


def test_what_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    run = RunDir.create(tmp_path, "mine")
    monkeypatch.setattr(directory, "LARGEST_JSON", 200)
    run.write_json("small.json", {"text": "a" * 50})
    with pytest.raises(InputError, match=r"large\.json: would have [23]\d\d bytes, and no more than 200 are read"):
        run.write_json("large.json", {"text": "a" * 150})
    assert not (run.path / "large.json").exists()


def test_an_edited_file_is_not_what_the_run_wrote(tmp_path):
    run = RunDir.create(tmp_path, "mine")
    run.write_json("results.json", {"schema_version": 2, "val_loss": 3.25})
    whole = (run.path / "results.json").read_text()
    for edited in (whole.replace("3.25", "3.15"), whole.replace("sha256", "sha255"), whole.replace("val_", "Val_")):
        (run.path / "results.json").write_text(edited)
        with pytest.raises(InputError, match=r"results\.json: damaged"):
            run.read_json("results.json")
    (run.path / "results.json").write_text('{"schema_version": 1, "val_loss": 3.25}')  # as version 0.1.0 wrote it
    assert run.read_json("results.json")["val_loss"] == 3.25


def test_settings_are_read_from_the_copy_where_they_are_damaged(tmp_path):
    run = RunDir.create(tmp_path, "mine")
    run.begin({"schema_version": 2, "config": {"seed": 3}})
    file = run.path / "config.json"
    file.write_text(file.read_text().replace("3", "4"))
    with pytest.warns(Note, match=r"config\.json: damaged .* read .*checkpoints/config\.json instead"):
        again = RunDir.open(run.path)
    assert (again.description["config"], again.run_id) == ({"seed": 3}, run.run_id)
    file.unlink()
    with pytest.warns(Note, match=r"config\.json: .* read .*checkpoints/config\.json instead"):
        assert RunDir.open(run.path).run_id == run.run_id
    file.write_text("{")
    (run.path / "checkpoints" / "config.json").unlink()
    with pytest.raises(InputError, match=r"mine-.*/config\.json: not valid JSON"):
        RunDir.open(run.path)


def test_a_file_that_belongs_to_the_settings_is_checked(tmp_path):
    run, words = RunDir.create(tmp_path, "mine"), ["a", "b", "c"]
    run.begin({"files": {"vocabulary.json": json_sha256(words)}}, {"vocabulary.json": words})
    assert run.read_json("vocabulary.json") == words
    run.write_json("vocabulary.json", ["b", "a", "c"])
    with pytest.raises(InputError, match=r"vocabulary\.json: damaged, or changed .* --resume .* writes it again"):
        run.read_json("vocabulary.json")


def test_metrics_are_a_line_each(tmp_path):
    run = RunDir.create(tmp_path, "mine")
    run.write_metrics([])
    run.append_metrics({"epoch": 1, "val_ppl": math.inf})
    run.append_metrics({"epoch": 2, "val_ppl": 3.0})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 1, "val_ppl": None}, {"epoch": 2, "val_ppl": 3.0}]
    run.write_metrics([{"epoch": 1}])
    assert (run.path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


def test_a_line_that_does_not_fit_leaves_no_half(tmp_path):
    run = RunDir.create(tmp_path, "mine")
    run.append_metrics({"epoch": 1})
    # A process may be forbidden to write files beyond a size: the write takes what fits, as on a disk that fills up.
    code = (
        "import resource, sys; from pathlib import Path; from newllm_jax.records.directory import RunDir\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "RunDir(Path(sys.argv[1]), {}).append_metrics({'epoch': 2})"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
    assert "No space left on device" in ran.stderr and "metrics.jsonl" in ran.stderr
    assert (run.path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
