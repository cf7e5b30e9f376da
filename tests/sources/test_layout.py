"""Which files are read: those that the `datasets` library would find, none outside of the folder, and all are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from newllm_jax.errors import InputError
from newllm_jax.sources.layout import data_files, read_layout

TREES = {
    "shards": [
        "data/train-00000-of-00002.parquet", "data/train-00001-of-00002-a09b.parquet", "train.parquet",
        "data/own-00000-of-00001.csv.parquet", "data/test.parquet",
    ],
    "folders": [
        "train/b.csv", "train/a/c.csv", "my_training-1/a.csv", "x/test/a.csv", "validation.csv", "eval-2/a.csv",
    ],
    "names": [
        "train_10.txt", "train_2.txt", "wiki.train.txt", "a-training-b.txt", "wiki.valid.txt", "dev.txt", "x/val.txt",
        "strain.txt", "testing set.txt", "trained.txt",
    ],
    "no split is named": ["b.json", "a.jsonl", "sub-a/c.jsonl", "sub/c.jsonl", "strain.jsonl"],
    "hidden ones": ["a.txt", ".b.txt", ".git/train.txt", "__MACOSX/train.txt", "dataset_infos.json", "c.doc"],
}  # fmt: skip


def fill(folder: Path, names: list[str], configs: str = "") -> Path:
    """Empty files, and a README with a header where there are `configs`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if configs:
        (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# Texts\n")
    return folder


def found(folder: Path, configuration: str = "") -> dict[str, list[str]]:
    splits = read_layout(folder, configuration).splits
    return {split: [file.relative_to(folder).as_posix() for file in files] for split, files in splits.items()}


def complaint(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_layout(path, "")
    return str(caught.value)


def found_by_the_library(folder: Path, patterns: dict[str, list[str]] | None = None) -> dict[str, list[str]]:
    """The same by the library; a file that fits two of its patterns is there twice."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    endings = [".parquet", ".jsonl", ".json", ".csv", ".txt"]
    resolved = DataFilesDict.from_patterns(patterns or get_data_patterns(str(folder)), str(folder), endings)
    return {
        split: list(dict.fromkeys(Path(file).relative_to(folder).as_posix() for file in files))
        for split, files in resolved.items()
    }


@pytest.mark.parametrize("tree", TREES)
def test_the_conventions_are_those_of_the_library(tmp_path, tree):
    assert found(fill(tmp_path, TREES[tree])) == found_by_the_library(tmp_path)


FILES = ["a.txt", "b[1].txt", "k/a.txt", "k/l/train.txt", "k/l/m/b.txt", "l/a.txt", "train.txt"]


@pytest.mark.parametrize(
    "pattern",
    [
        "*", "a.txt", "./k//a.txt", "k/*", "k/**", "**", "**/a.txt", "**/l/**", "k/**/*.txt", "k/?/*", "[ak]*",
        "[!a]*.txt", "*/*/*", "**/**/b.txt", "b[[]1].txt", "k/*/**/b.txt",
    ],
)  # fmt: skip
def test_patterns_fit_what_they_fit_in_the_library(tmp_path, pattern):
    fill(tmp_path, FILES, f"- config_name: own\n  data_files: '{pattern}'")
    assert found(tmp_path) == found_by_the_library(tmp_path, {"train": [pattern]})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("configs", "splits"),
    [
        ("- config_name: own", {"train": ["k/l/train.txt", "train.txt"]}),
        ("- config_name: 1\n  data_files: a.txt", {"train": ["a.txt"]}),
        ("- config_name: own\n  data_files: [train.txt, 'k/*', a.txt]", {"train": ["train.txt", "k/a.txt", "a.txt"]}),
        (
            "- config_name: own\n  data_files: [{split: test, path: [a.txt, '*.txt']}, {split: own, path: k/*}]",
            {"test": ["a.txt", "b[1].txt", "train.txt"], "own": ["k/a.txt"]},
        ),
        ("- config_name: own\n  data_dir: ./k/l/", {"train": ["k/l/train.txt"]}),
        ("- config_name: own\n  data_dir: k\n  data_files: '*'", {"train": ["k/a.txt"]}),
    ],
)
def test_what_a_readme_declares(tmp_path, configs, splits):
    layout = read_layout(fill(tmp_path, FILES, configs), "")
    assert found(tmp_path) == splits
    assert layout.files[-1] == tmp_path / "README.md"
    assert layout.files[:-1] == sorted({tmp_path / name for names in splits.values() for name in names})


@pytest.mark.quick
def test_a_readme_says_how_to_read(tmp_path):
    fill(tmp_path, ["a.tsv"], "- config_name: own\n  data_files: a.tsv\n  column_names: [text]\n  default: true")
    layout = read_layout(tmp_path, "")
    assert (layout.reader, layout.options) == ("csv", {"sep": "\t", "column_names": ["text"]})


OUTSIDE = (
    "../outside.jsonl",
    "{}/outside.jsonl",
    "hf://datasets/a/b/x.jsonl",
    "https://a.b/x.jsonl",
    "zip://x.jsonl::a.zip",
)


@pytest.mark.quick
@pytest.mark.parametrize(
    "pattern", [*OUTSIDE, "gone.jsonl", "gone*", "a.jsonl.gz", "k/../a.jsonl", ".a.jsonl", "**/../*"]
)
def test_only_data_files_of_the_folder_can_be_named(tmp_path, pattern):
    pattern = pattern.format(tmp_path)
    fill(tmp_path, ["outside.jsonl"])
    for place in ("data_files: ['*', '{}']", "data_files: [{{split: test, path: '{}'}}]", "data_dir: '{}'"):
        names = ["a.jsonl", "k/b.jsonl", "a.jsonl.gz", ".a.jsonl"]
        fill(tmp_path / "own", names, f"- config_name: own\n  {place.format(pattern)}")
        assert "README.md names '" in complaint(tmp_path / "own")
        assert "', which is no data file of " in complaint(tmp_path / "own")


@pytest.mark.quick
def test_no_link_leaves_the_folder(tmp_path):
    folder = fill(tmp_path / "own", ["real/train.txt"])
    fill(tmp_path / "elsewhere", ["a.txt", "README.md"])
    (folder / "dev.txt").symlink_to("real/train.txt")
    assert found(folder) == {"train": ["real/train.txt"], "validation": ["dev.txt"]}
    (tmp_path / "link").symlink_to(folder)  # what the user names
    (tmp_path / "link.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    assert found(tmp_path / "link") == found(folder)
    assert read_layout(tmp_path / "link.txt", "").splits == {"train": [tmp_path / "link.txt"]}
    for name in ("README.md", "test.txt"):
        (folder / name).symlink_to(tmp_path / "elsewhere" / ("README.md" if name == "README.md" else "a.txt"))
        assert complaint(folder) == (
            f"dataset: {folder}/{name} is a link that leaves the folder; put a copy there, or name {tmp_path}/elsewhere"
        )
        (folder / name).unlink()


@pytest.mark.quick
def test_links_of_the_hubs_cache_are_followed_to_its_blobs_only(tmp_path):
    blobs = fill(tmp_path / "hub" / "datasets--a--b" / "blobs", ["12ab"])
    snapshot = blobs.parent / "snapshots" / "34cd"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "train.txt").symlink_to("../../../blobs/12ab")
    assert found(snapshot) == {"train": ["data/train.txt"]}
    assert found(snapshot / "data") == {"train": ["train.txt"]}
    fill(blobs.parent, ["secret"])
    (snapshot / "data" / "test.txt").symlink_to("../../../secret")
    assert "is a link that leaves the folder" in complaint(snapshot)


@pytest.mark.quick
def test_files_of_several_kinds(tmp_path):
    message = complaint(fill(tmp_path, ["a.tsv", "b.csv"]))
    assert "has rows in files of several kinds (.csv, .tsv); name one file, or those to read in the configs" in message
    fill(tmp_path, [], "- config_name: own\n  data_files: a.tsv")
    assert found(tmp_path) == {"train": ["a.tsv"]}


@pytest.mark.quick
@pytest.mark.parametrize(
    "header",
    [
        "[" * 2000, "a: &a [b]\nconfigs: *a", "configs: [1]", "configs: [{}]", "configs: [{config_name: [a]}]",
        "configs: [{config_name: a}, {config_name: a}]", "configs: [{config_name: a, data_files: [{split: b}]}]",
        "configs: [{config_name: a, data_files: [{split: b, path: c}, a.txt]}]",
        "configs: [{config_name: a, data_files: [{split: b, path: c}, {split: b, path: d}]}]",
        "configs: [{config_name: a, data_files: [{split: b, path: []}]}]",
        "configs: [{config_name: a, data_files: 1}]",
        "configs: [{config_name: a, data_files: []}]", "configs: [{config_name: a, data_files: [[a]]}]",
        "configs: [{config_name: a, data_dir: [b]}]", "configs: [{config_name: a, cache_dir: /}]",
        "a: !!python/name:os.system",
    ],
)  # fmt: skip
def test_headers_that_cannot_be_read(tmp_path, header):
    fill(tmp_path, ["a.txt"])
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
    message = complaint(tmp_path)
    assert message.startswith(f"dataset: {tmp_path}/README.md has a header that cannot be read (")
    assert "\n" not in message


@pytest.mark.quick
def test_a_header_that_unfolds_without_end_is_not_unfolded(tmp_path):
    fill(tmp_path, ["a.txt"])
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))]
    (tmp_path / "README.md").write_text("\n".join(["---", *lines, "configs: [{config_name: *a39}]", "---", ""]))
    assert "has a header that cannot be read (a text is expected, not list)" in complaint(tmp_path)
    (tmp_path / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    assert found(tmp_path) == {"train": ["a.txt"]}


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [
        "",
        "---",
        "---\n---",
        "---\n\n---\n",
        "# Texts\n---\nconfigs: 3\n---\n",
        "---\nconfigs: 3\n--- \n",
        "---\n" + "\n" * 10**6,
    ],
)
def test_a_readme_without_a_header_declares_nothing(tmp_path, text):
    fill(tmp_path, ["a.txt"])
    (tmp_path / "README.md").write_text(text)
    assert found(tmp_path) == {"train": ["a.txt"]}


@pytest.mark.quick
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_of_a_header(tmp_path, line_end):
    fill(tmp_path, FILES)
    text = line_end.join(["", "---", "configs:", "- config_name: own", "  data_files: a.txt", "---", "# Texts"])
    (tmp_path / "README.md").write_bytes(text.encode())
    assert found(tmp_path) == {"train": ["a.txt"]}


@pytest.mark.quick
def test_data_files_are_those_that_can_be_read(tmp_path):
    fill(tmp_path, ["b.txt", "k/a.parquet", ".c.txt", "d.doc", "dataset_infos.json"])
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "nowhere.txt").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe.txt")
    assert data_files(tmp_path) == [tmp_path / "b.txt", tmp_path / "k/a.parquet"]
    (tmp_path / "README.md").touch()
    assert data_files(tmp_path) == [tmp_path / "b.txt", tmp_path / "k/a.parquet", tmp_path / "README.md"]
    assert data_files(tmp_path / "d.doc") == [tmp_path / "d.doc"]
