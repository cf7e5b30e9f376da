"""Text sources: every kind of file and folder, what each fault says, and splits that hold still."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from newllm_jax.errors import InputError
from newllm_jax.sources.text import builtin_paragraphs, builtin_topics, open_source, split_by_hash
from tests.sources.text_files import LINES, SPLITS, complaint, fill, rows


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
