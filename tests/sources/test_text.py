"""Text sources: every kind of file and folder, what each fault says, and splits that hold still."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from newllm_jax.errors import InputError
from newllm_jax.sources.text import builtin_paragraphs, builtin_topics, open_source, split_by_hash

SPLITS = ("train", "validation", "test")
LINES = ["first line , of words", "second line", "third"]


def fill(path, *lines):
    """Writes rows in the format that the file's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = lines or LINES
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(lines)}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": line} for line in lines]))
    elif path.suffix == ".csv":
        path.write_text("id,text\n" + "".join(f'{index},"{line}"\n' for index, line in enumerate(lines)))
    elif path.suffix == ".tsv":
        path.write_text("id\ttext\n" + "".join(f"{index}\t{line}\n" for index, line in enumerate(lines)))
    else:
        path.write_text("".join(f"{line}\n" for line in lines))
    return path


def rows(path, configuration="", names=SPLITS):
    return open_source(str(path), configuration, "error").splits(names)


def complaint(path, configuration=""):
    with pytest.raises(InputError) as caught:
        rows(path, configuration)
    return str(caught.value)


@pytest.fixture
def several(tmp_path):
    """A folder of the Hub's layout with two configurations."""
    header = "\n".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train*\n"
        f"  - split: test\n    path: {name}/test*"
        for name in ("poems", "prose")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{header}\n---\n# Texts\n")
    for name in ("poems", "prose"):
        fill(tmp_path / name / "train.parquet", f"{name} to learn")
        fill(tmp_path / name / "test.parquet", f"{name} to test")
    return tmp_path


def test_the_real_folder(real_data):
    source = open_source(str(real_data / "datasets" / "wikitext"), "", "error")
    assert source.configuration == "wikitext-2-v1"
    assert source.fallback == ""
    splits = source.splits(SPLITS)
    filled = {split: sum(map(bool, map(str.strip, texts))) for split, texts in splits.items()}
    assert filled == {"train": 23_767, "validation": 2_461, "test": 2_891}


@pytest.mark.quick
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv", "tsv", "txt"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, ending):
    alone = rows(fill(tmp_path / f"alone.{ending}"), names=["train"])
    assert alone == {"train": LINES}
    for split in SPLITS:
        fill(tmp_path / "folder" / f"{split}.{ending}", f"of {split}")
    assert rows(tmp_path / "folder") == {split: [f"of {split}"] for split in SPLITS}


@pytest.mark.quick
@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_names_of_the_validation_split(tmp_path, name):
    for split in ("train", name, "test"):
        fill(tmp_path / f"{split}.txt", f"of {split}")
    assert rows(tmp_path)["validation"] == [f"of {name}"]
    # A configuration may name its splits as it likes.
    fill(tmp_path / "own" / "data" / "a.txt", "to train")
    fill(tmp_path / "own" / "data" / "b.txt", "to validate")
    (tmp_path / "own" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/a.txt\n"
        f"  - split: {name}\n    path: data/b.txt\n---\n"
    )
    assert rows(tmp_path / "own")["validation"] == ["to validate"]


@pytest.mark.quick
def test_missing_splits_are_taken_from_train(tmp_path):
    lines = [f"line {index} of many" for index in range(1000)]
    fill(tmp_path / "train.txt", *lines)
    splits = rows(tmp_path)
    assert sorted(line for texts in splits.values() for line in texts) == sorted(lines)
    assert 60 < len(splits["validation"]) < 140 and 60 < len(splits["test"]) < 140

    fill(tmp_path / "test.txt", "a test of its own")
    kept = rows(tmp_path)
    assert kept["test"] == ["a test of its own"]
    assert kept["validation"] == splits["validation"]
    assert set(kept["train"]) == set(splits["train"]) | set(splits["test"])


@pytest.mark.quick
def test_a_row_keeps_its_split_whatever_stands_beside_it():
    lines = [f"row {index}" for index in range(3000)]
    splits = split_by_hash(lines, SPLITS)
    assert [round(len(splits[split]) / 3000, 1) for split in SPLITS] == [0.8, 0.1, 0.1]
    assert not set(splits["train"]) & (set(splits["validation"]) | set(splits["test"]))
    later = split_by_hash(["another", *reversed(lines), "row 7"], SPLITS)
    assert all(set(splits[split]) <= set(later[split]) for split in SPLITS)
    # What these rows' hashes are is part of the format: the splits of yesterday's runs are those of today's.
    assert [next(name for name in SPLITS if row in splits[name]) for row in lines[:12]] == [
        "test",
        "validation",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "validation",
        "train",
        "train",
    ]


@pytest.mark.quick
def test_one_of_several_configurations_must_be_named(several):
    assert complaint(several) == (
        f"dataset_config: {several} has several configurations, name one of: poems, prose"
    )  # fmt: skip
    assert "has no configuration 'pros'; did you mean prose?" in complaint(several, "pros")
    assert rows(several, "prose", ["train", "test"]) == {"train": ["prose to learn"], "test": ["prose to test"]}
    assert open_source(str(several), "prose", "error").name == f"{several} (prose)"
    assert open_source(str(several), "prose", "error").fingerprint != (
        open_source(str(several), "poems", "error").fingerprint
    )  # fmt: skip


@pytest.mark.quick
def test_the_only_configuration_need_not_be_named(several):
    readme = (several / "README.md").read_text()
    (several / "README.md").write_text(readme[: readme.index("- config_name: prose")] + "---\n")
    assert rows(several, names=["train"])["train"] == ["poems to learn"]
    fill(several.parent / "plain" / "train.txt")
    assert "has no configuration 'prose'; the source declares none" in complaint(several.parent / "plain", "prose")


@pytest.mark.quick
@pytest.mark.parametrize("header", [b"---\nconfigs: [\n---\n", b"---\nconfigs: 3\n---\n", b"\xff---\n"])
def test_a_damaged_header(tmp_path, header):
    (tmp_path / "README.md").write_bytes(header)
    fill(tmp_path / "train.txt")
    assert "README.md has a header that cannot be read" in complaint(tmp_path)


@pytest.mark.quick
def test_nothing_there(tmp_path):
    assert complaint(tmp_path / "gone").startswith(f"dataset: '{tmp_path}/gone' does not exist")
    assert complaint("").startswith("dataset: '' does not exist")
    assert complaint("no/file.txt").startswith("dataset: 'no/file.txt' does not exist")
    assert complaint("~nobody-of-that-name/x").startswith("dataset: '~nobody-of-that-name/x' has no home folder")
    assert complaint("owner/name", "/x").startswith("dataset_config: must be a name without folders, not '/x'")
    assert "has no data files (.parquet, .jsonl" in complaint(tmp_path)
    fill(tmp_path / ".hidden" / "train.txt")
    (tmp_path / "README.md").write_text("# Words about words\n")
    assert "has no data files" in complaint(tmp_path)
    (tmp_path / "notes.doc").write_text("words")
    assert complaint(tmp_path / "notes.doc").endswith(
        "notes.doc is not one of .parquet, .jsonl, .json, .csv, .tsv, .txt"
    )


@pytest.mark.quick
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "txt"])
def test_an_empty_file_is_named(tmp_path, ending):
    fill(tmp_path / f"train.{ending}")
    (tmp_path / f"test.{ending}").write_bytes(b"")
    assert complaint(tmp_path) == f"dataset: {tmp_path}/test.{ending} is empty"


@pytest.mark.quick
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_no_text_column(tmp_path, ending):
    path = fill(tmp_path / f"rows.{ending}")
    if ending == "parquet":
        pq.write_table(pa.table({"words": ["a"]}), path)
    else:
        path.write_text(path.read_text().replace("text", "words"))
    assert complaint(path).startswith(f"dataset: {path} has no column 'text' (it has ")


@pytest.mark.quick
@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [b"a", b"b"]], ids=["numbers", "lists", "bytes"])
def test_a_text_column_without_text(tmp_path, values):
    pq.write_table(pa.table({"text": values}), tmp_path / "rows.parquet")
    assert f"column 'text' of {tmp_path}/rows.parquet holds {type(values[0]).__name__}, not text" in complaint(
        tmp_path / "rows.parquet"
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.txt", b"fine\nna\xefve\n"),
        ("rows.csv", b"text\nfine\nna\xefve\n"),
        ("rows.jsonl", b'{"text": "fine"}\n{"text": "na\xefve"}\n'),
    ],
)
def test_text_that_is_not_utf8(tmp_path, capfd, name, content):
    (tmp_path / name).write_bytes(content)
    assert "is not UTF-8" in complaint(tmp_path / name)
    assert capfd.readouterr().err == ""  # the readers would log it too

    fill(tmp_path / "folder" / f"train{(tmp_path / name).suffix}")
    shutil.copy(tmp_path / name, tmp_path / "folder" / f"test{(tmp_path / name).suffix}")
    assert "is not UTF-8" in complaint(tmp_path / "folder")


@pytest.mark.quick
def test_parquet_that_is_not_utf8(tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"na\xefve"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    assert complaint(tmp_path / "rows.parquet") == f"dataset: column 'text' of {tmp_path}/rows.parquet is not UTF-8"


@pytest.mark.quick
@pytest.mark.parametrize(("name", "content"), [("rows.parquet", "no"), ("rows.jsonl", '{"text": "a"}\n{"te')])
def test_damaged_files(tmp_path, capfd, name, content):
    (tmp_path / name).write_text(content)
    message = complaint(tmp_path / name)
    assert message.startswith(f"dataset: {tmp_path}/{name} cannot be read (") and "\n" not in message
    assert capfd.readouterr().err == ""


@pytest.mark.quick
def test_rows_without_words_stay_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": null}\n{"text": "a b"}\n{"text": " "}\n')
    assert rows(tmp_path / "rows.jsonl", names=["train"])["train"] == ["", "a b", " "]


@pytest.mark.quick
def test_no_train_split(tmp_path):
    fill(tmp_path / "test.txt")
    assert complaint(tmp_path) == f"dataset: {tmp_path} has no train split (it has test)"


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


@pytest.mark.quick
def test_names_that_mean_something_to_the_library(tmp_path):
    for name in ("a[1].txt", "*.txt", "zip::b.txt", "{split}.txt", "c d?.txt"):
        assert rows(fill(tmp_path / name, f"of {name}"), names=["train"])["train"] == [f"of {name}"]
    assert len(rows(tmp_path, names=["train"])["train"]) == 5


@pytest.mark.quick
def test_a_path_may_be_relative(tmp_path, monkeypatch):
    fill(tmp_path / "own" / "train.txt")
    monkeypatch.chdir(tmp_path)
    assert rows("own", names=["train"]) == rows("own/train.txt", names=["train"]) == {"train": LINES}


@pytest.mark.quick
def test_two_read_at_once(tmp_path):
    places = [fill(tmp_path / str(number) / "train.jsonl", f"words of {number}").parent for number in range(6)] * 2
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(lambda place: rows(place, names=["train"])["train"], places))
    assert read == [[f"words of {place.name}"] for place in places]


@pytest.mark.quick
def test_the_built_in_text_has_no_configuration():
    with pytest.raises(InputError, match="^dataset_config: builtin has no configurations, and 'prose' is asked for$"):
        open_source("builtin", "prose", "error")
    assert open_source("someone/texts", "prose", "builtin").path is None  # it was of what the text replaces


@pytest.mark.quick
def test_the_built_in_text():
    source = open_source("builtin", "", "error")
    assert source.name.startswith("builtin (pydoc topics of Python 3.")
    assert source.provenance()["fallback"] == ""
    splits = source.splits(SPLITS)
    assert sum(map(len, splits.values())) == len(builtin_paragraphs()) > 1000
    assert len(builtin_topics()) > 50
    assert any("assignment" in text for text in splits["train"])
