"""Fingerprints of text sources: of what is read, whatever changes between."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile

import pytest

from newllm_jax.errors import InputError
from newllm_jax.sources.text import open_source
from tests.sources.text_files import LINES, SPLITS, fill, rows


@pytest.mark.quick
def test_the_fingerprint_is_the_contents_and_not_the_places(tmp_path):
    for place in ("here", "there"):
        fill(tmp_path / place / "train.txt", "one", "two")
    here, there = (open_source(str(tmp_path / place), "", "error") for place in ("here", "there"))
    assert here.fingerprint == there.fingerprint
    assert here.name != there.name
    fill(tmp_path / "there" / "train.txt", "one", "too")
    assert open_source(str(tmp_path / "there"), "", "error").fingerprint != here.fingerprint
    (tmp_path / "here" / "train.txt").rename(tmp_path / "here" / "test.txt")
    assert open_source(str(tmp_path / "here"), "", "error").fingerprint != here.fingerprint
    assert open_source("builtin", "", "error").fingerprint == open_source("builtin", "", "error").fingerprint


@pytest.mark.quick
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv", "tsv", "txt"])
def test_files_replaced_under_the_same_time_are_read_anew(tmp_path, ending):
    for place in (tmp_path / f"alone.{ending}", tmp_path / "folder" / f"train.{ending}"):
        read, fingerprints = [], []
        for word in ("red", "tan"):  # of one length
            fill(place, f"{word} words")
            os.utime(place, (1e9, 1e9))
            os.utime(place.parent, (1e9, 1e9))
            source = open_source(str(place if place.stem == "alone" else place.parent), "", "error")
            read.append(source.splits(["train"])["train"])
            fingerprints.append(source.fingerprint)
        assert read == [["red words"], ["tan words"]]
        assert fingerprints[0] != fingerprints[1]


@pytest.mark.quick
def test_nothing_is_left_in_a_cache(tmp_path, monkeypatch):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert rows(fill(tmp_path / "own" / "a.jsonl"), names=["train"])["train"] == LINES
    assert list(tmp_path.iterdir()) == [tmp_path / "own"]


@pytest.mark.quick
@pytest.mark.parametrize(
    "method", [lambda source: source.splits(["train"]), lambda source: list(source.rows(["text"]))]
)
def test_files_that_change_between_fingerprint_and_reading_are_noticed(tmp_path, method):
    changes = {
        "content": lambda: fill(tmp_path / "train.txt", "other words"),
        "a file more": lambda: fill(tmp_path / "train-2.txt"),
        "a file less": lambda: (tmp_path / "train.txt").unlink(),
        "another README": lambda: (tmp_path / "README.md").write_text("# Other words\n"),
        "nothing left": lambda: shutil.rmtree(tmp_path),
    }
    for change in changes.values():
        for name in ("train.txt", "train-1.txt", "README.md"):
            fill(tmp_path / name)
        source = open_source(str(tmp_path), "", "error")
        change()
        with pytest.raises(InputError, match="has changed while it was read; start again"):
            method(source)
        (tmp_path / "train-2.txt").unlink(missing_ok=True)
    fill(tmp_path / "train.txt")
    source = open_source(str(tmp_path), "", "error")
    fill(tmp_path / "notes.doc")  # which nobody reads
    assert method(source)


@pytest.mark.quick
def test_what_is_not_read_is_not_in_the_fingerprint(several):
    before = open_source(str(several), "prose", "error")
    assert [file.relative_to(several).as_posix() for file in before.layout.files] == [
        "prose/test.parquet", "prose/train.parquet", "README.md",
    ]  # fmt: skip
    (several / "prose" / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}'))
    fill(several / "poems" / "train.parquet", "other poems")
    after = open_source(str(several), "prose", "error")
    assert (after.fingerprint, after.splits(SPLITS)) == (before.fingerprint, before.splits(SPLITS))


@pytest.mark.quick
def test_fingerprints_of_version_0_1_0(tmp_path):
    fill(tmp_path / "a.txt")
    assert open_source(str(tmp_path / "a.txt"), "", "error").fingerprint == (
        "0bfd5498883e7fa9730db98d8ee59c72c7f93fd04dbf08ecc589542682aee1e2"
    )  # fmt: skip
    fill(tmp_path / "own" / "data" / "test.txt").rename(tmp_path / "own" / "data" / "test.jsonl")
    fill(tmp_path / "own" / "data" / "train.jsonl")
    (tmp_path / "own" / "README.md").write_text("---\nconfigs:\n- config_name: own\n---\n")
    assert open_source(str(tmp_path / "own"), "", "error").fingerprint == (
        "f1a1b211d3726ea1068cbb701ef03169a926c812ec60717c4bb19262c0754a13"
    )  # fmt: skip
