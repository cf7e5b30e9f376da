"""Text sources: a Hub name, a local folder or file, or `builtin`; each gives rows of named text columns per split."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

from newllm_jax.config import check, expanded
from newllm_jax.errors import InputError
from newllm_jax.sources.columns import Column, open_columns
from newllm_jax.sources.hub import HubOutOfReach, hub_folder
from newllm_jax.sources.layout import READERS, Layout, data_files, read_layout


@dataclass(frozen=True)
class TextSource:
    """Where rows come from. Opening one reads no rows: a prepared cache may make that needless.

    Attributes:
      asked: the source as the user named it.
      path: the local folder or file; None for the built-in text.
      layout: which files of the path are read; None for the built-in text.
      fallback: why another source replaced the one asked for; "" where none did.
      fingerprint: sha256 over the content of the files that are read, the same wherever they lie.
    """

    asked: str
    path: Path | None
    layout: Layout | None
    fallback: str
    fingerprint: str

    @property
    def configuration(self) -> str:
        """Which configuration of the folder is read ("" where it declares none)."""
        return self.layout.configuration if self.layout else ""

    @property
    def name(self) -> str:
        """The source that is really read, for reports."""
        if self.path is None:
            return f"builtin (pydoc topics of Python {sys.version_info.major}.{sys.version_info.minor})"
        return f"{self.asked} ({self.configuration})" if self.configuration else self.asked

    def provenance(self) -> dict[str, Any]:
        """What `results.json` says about the source."""
        return {"source": self.name, "asked": self.asked, "fallback": self.fallback, "fingerprint": self.fingerprint}

    def splits(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The texts of `open_splits`, all of them in memory. Raises InputError as it does."""
        with self.open_splits(names) as found:
            return {split: list(texts) for split, texts in found.items()}

    @contextmanager
    def open_splits(self, names: Sequence[str]) -> Iterator[dict[str, Iterable[str]]]:
        """The `text` column of each split, to be read while the context lasts, as often as one likes.

        A split that the source lacks takes every tenth row of `train` (by hash). A few rows are in memory at a time.

        Raises:
          InputError: unreadable files, no `text` column, no split to take rows from, or files that are no longer what
            their fingerprint says; and while texts are read, for what is no text or not UTF-8.
        """
        if self.path is None or self.layout is None:
            yield dict(split_by_hash(builtin_paragraphs(), names))
            return
        with self._open_columns(["text"]) as found:
            present: dict[str, Iterable[str]] = {
                _SPLIT_NAMES.get(split, split): texts for split, (texts,) in found.items()
            }  # fmt: skip
            if missing := [name for name in names if name not in present]:
                shared = ["train", *missing]
                present |= {name: HashedSplit(present["train"], shared, name) for name in shared}
            yield present

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, str]]:
        """The rows of the train split, in order, with these text columns; absent values are empty text.

        The built-in text has a row for each topic: its name in the first column, its text in the last.

        Raises:
          InputError: unreadable files, no train split, a column that is missing or holds no text, or files that are
            no longer what their fingerprint says.
        """
        if self.path is None or self.layout is None:
            topics = builtin_topics()
            train = set(split_by_hash(topics.values(), ["train", "validation", "test"])["train"])
            for name, topic in topics.items():
                if topic in train:
                    yield {**dict.fromkeys(columns, ""), columns[0]: name, columns[-1]: topic}
            return
        with self._open_columns(columns) as found:
            for values in zip(*found["train"], strict=True):
                yield dict(zip(columns, values, strict=True))

    @contextmanager
    def _open_columns(self, names: Sequence[str]) -> Iterator[dict[str, list[Column]]]:
        """The columns of each split, out of exactly the files that the fingerprint is of."""
        assert self.path is not None and self.layout is not None
        if "train" not in self.layout.splits:
            raise InputError(f"dataset: {self.path} has no train split (it has {', '.join(self.layout.splits)})")
        with ExitStack() as stack:
            try:
                found = {
                    split: stack.enter_context(open_columns(self.path, files, self.layout, names))
                    for split, files in self.layout.splits.items()
                }
            except Exception:
                _check_unchanged(self.path, self.layout, self.fingerprint)  # half-written files cannot be read
                raise
            _check_unchanged(self.path, self.layout, self.fingerprint)
            yield found


_SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation"}


def open_source(dataset: str, configuration: str, fallback: str, hub_configuration: str = "") -> TextSource:
    """Finds a text source without reading its rows.

    Args:
      dataset: `builtin`, a path that exists, or a Hub name.
      configuration: the one to read where there are several; "" for the only one.
      fallback: `builtin` or `error`, for a Hub that is out of reach.
      hub_configuration: the default configuration where the source is the Hub.

    Raises:
      InputError: no such path or repository, an empty file, whatever `read_layout` finds wrong, a Hub that is out of
        reach where `fallback` is `error`.
    """
    if dataset == "builtin":
        if configuration:
            raise InputError(f"dataset_config: builtin has no configurations, and {configuration!r} is asked for")
        return _builtin(dataset, "")
    path = expanded("dataset", dataset)
    if not dataset or not path.exists():
        if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")) or path.suffix in READERS:
            raise InputError(f"dataset: {dataset!r} does not exist (a folder, file, Hub name or builtin is expected)")
        configuration = configuration or hub_configuration
        check(
            "dataset_config", configuration, "a name without folders", configuration in ("", Path(configuration).name)
        )
        try:
            path = _hub_snapshot(dataset, configuration)
        except HubOutOfReach as error:
            if fallback == "error" or path.parent.is_dir():  # `data/wikitxt` beside `data/wikitext` is a slip
                raise InputError(f"dataset: {error}; name a local folder or file that exists, or builtin") from error
            return _builtin(dataset, str(error))
    layout = read_layout(path, configuration)
    for file in layout.files:
        if file.stat().st_size == 0:
            raise InputError(f"dataset: {file} is empty")
    return TextSource(dataset, path, layout, "", _fingerprint(path, layout))


def builtin_topics() -> dict[str, str]:
    """The help topics that every Python carries, by name, in alphabetical order."""
    from pydoc_data.topics import topics

    return {name: topics[name] for name in sorted(topics)}


def builtin_paragraphs() -> list[str]:
    """The built-in text, one paragraph a row."""
    return [paragraph for topic in builtin_topics().values() for paragraph in topic.split("\n\n")]


def split_by_hash(rows: Iterable[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Splits rows by a hash of their own text: a tenth to each name but the first, the rest to the first.

    A row keeps its split whatever stands beside it, and equal rows never lie on both sides.
    """
    splits: dict[str, list[str]] = {name: [] for name in names}
    for row in rows:
        splits[_hashed_split(row, names)].append(row)
    return splits


@dataclass(frozen=True)
class HashedSplit:
    """The rows that `split_by_hash` gives to the split `name`, found anew each time that they are iterated."""

    rows: Iterable[str]
    names: Sequence[str]
    name: str

    def __iter__(self) -> Iterator[str]:
        return (row for row in self.rows if _hashed_split(row, self.names) == self.name)

    def __length_hint__(self) -> int:
        tenths = 1 if self.name in self.names[1:] else 11 - len(self.names)
        return length_hint(self.rows) * tenths // 10


def _hashed_split(row: str, names: Sequence[str]) -> str:
    bucket = hashlib.sha256(row.encode("utf-8", "surrogatepass")).digest()[0] % 10
    return names[bucket + 1] if bucket + 1 < len(names) else names[0]


def _builtin(asked: str, fallback: str) -> TextSource:
    digest = hashlib.sha256("\0".join(builtin_topics().values()).encode()).hexdigest()
    return TextSource(asked, None, None, fallback, digest)


def _hub_snapshot(repository: str, configuration: str) -> Path:
    """A Hub data set as a folder: only the configuration's own folder where the repository has one of that name."""
    if configuration:
        path = hub_folder(repository, "dataset", ["README.md", f"{configuration}/*"])
        if data_files(path):
            return path
    return hub_folder(repository, "dataset")


def _fingerprint(path: Path, layout: Layout) -> str:
    """sha256 over the configuration, and names and content of all files that are read."""
    digest = hashlib.sha256(layout.configuration.encode())
    for file in layout.files:
        digest.update(file.relative_to(path).as_posix().encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _check_unchanged(path: Path, layout: Layout, fingerprint: str) -> None:
    now = read_layout(path, layout.configuration) if path.exists() else None
    if now is None or now != layout or _fingerprint(path, now) != fingerprint:
        raise InputError(f"dataset: {path} has changed while it was read; start again when it is complete")
