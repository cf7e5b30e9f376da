"""Text sources: a Hub name, a local folder or file, or `builtin`; each gives rows of named text columns per split."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_jax.config import check, expanded
from newllm_jax.errors import InputError, causes, disk_fault
from newllm_jax.sources.hub import HubOutOfReach, hub_folder
from newllm_jax.sources.layout import READERS, Layout, data_files, read_layout

ROWS = 10_000  # that are in memory at a time


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
        """The `text` column of each split; a split that the source lacks takes every tenth row of `train` (by hash).

        Raises:
          InputError: unreadable files, no `text` column, text that is not UTF-8, no split to take rows from, or files
            that are no longer what their fingerprint says.
        """
        if self.path is None or self.layout is None:
            return split_by_hash(builtin_paragraphs(), names)
        found = _read_columns(self.path, self.layout, self.fingerprint, ["text"])
        present = {_SPLIT_NAMES.get(split, split): texts for split, (texts,) in found.items()}
        missing = [name for name in names if name not in present]
        return present | split_by_hash(present["train"], ["train", *missing]) if missing else present

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, str]]:
        """The rows of the train split, in order, with these text columns; absent values are empty text.

        They are read some at a time. What is wrong with one is told when it is reached.

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
        for texts in _read_batches(self.path, self.layout, self.fingerprint, columns):
            for values in zip(*texts, strict=True):
                yield dict(zip(columns, values, strict=True))


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
        bucket = hashlib.sha256(row.encode("utf-8", "surrogatepass")).digest()[0] % 10
        splits[names[bucket + 1] if bucket + 1 < len(names) else names[0]].append(row)
    return splits


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


def _read_batches(path: Path, layout: Layout, fingerprint: str, columns: Sequence[str]) -> Iterator[list[list[str]]]:
    """The texts of the train split, some rows at a time and column by column, as `_read_columns` gives them."""
    _check_train(path, layout)
    with ExitStack() as stack:
        try:
            rows = stack.enter_context(_opened(path, layout.splits["train"], layout))
        except Exception:
            _check_unchanged(path, layout, fingerprint)
            raise
        _check_unchanged(path, layout, fingerprint)  # what is read from now on is a copy
        for start in range(0, max(len(rows), 1), ROWS):
            part = rows.select(range(start, min(start + ROWS, len(rows))))
            yield [_column(part, name, path) for name in columns]


def _check_train(path: Path, layout: Layout) -> None:
    if "train" not in layout.splits:
        raise InputError(f"dataset: {path} has no train split (it has {', '.join(layout.splits)})")


def _read_columns(path: Path, layout: Layout, fingerprint: str, columns: Sequence[str]) -> dict[str, list[list[str]]]:
    """The texts of each split, column by column, out of exactly the files that the fingerprint is of."""
    _check_train(path, layout)
    try:
        found = {split: _read_files(path, files, layout, columns) for split, files in layout.splits.items()}
    except Exception:
        _check_unchanged(path, layout, fingerprint)  # half-written files cannot be read
        raise
    _check_unchanged(path, layout, fingerprint)
    return found


def _check_unchanged(path: Path, layout: Layout, fingerprint: str) -> None:
    now = read_layout(path, layout.configuration) if path.exists() else None
    if now is None or now != layout or _fingerprint(path, now) != fingerprint:
        raise InputError(f"dataset: {path} has changed while it was read; start again when it is complete")


def _read_files(path: Path, files: Sequence[Path], layout: Layout, columns: Sequence[str]) -> list[list[str]]:
    """The texts of some files, column by column."""
    with _opened(path, files, layout) as rows:
        return [_column(rows, name, path) for name in columns]


@contextmanager
def _opened(path: Path, files: Sequence[Path], layout: Layout) -> Iterator[Any]:
    """Some files as the `datasets` library reads them: a table in a file of its own, memory-mapped.

    Its cache knows a file by its name and the time of its last change, so each reading has a cache of its own. And it
    takes a name for a pattern, or for a path within an archive, so it is told of links with plain names.
    """
    import datasets
    from datasets.utils import logging

    datasets.disable_progress_bars()
    loud = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs an error before it raises it
    try:
        with tempfile.TemporaryDirectory() as folder:
            links = [Path(folder) / f"{number:05}{file.suffix}" for number, file in enumerate(files)]
            for link, file in zip(links, files, strict=True):
                link.symlink_to(file.resolve())
            read = getattr(datasets.Dataset, f"from_{layout.reader}")
            yield read(list(map(str, links)), cache_dir=folder, **layout.options)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        if disk_fault(error):
            raise  # not the data set's fault
        _check_utf8(files)
        raise InputError(f"dataset: {path} cannot be read ({_reason(error)})") from error
    finally:
        logging.set_verbosity(loud)


def _check_utf8(files: Sequence[Path]) -> None:
    """Raises InputError naming the first text file that is not UTF-8: the readers' own messages name none."""
    for file in files:
        if file.suffix != ".parquet":
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise InputError(f"dataset: {file} is not UTF-8 (byte {byte:#04x} at {error.start})") from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: `datasets` wraps what really happened."""
    innermost = list(causes(error))[-1]
    return next(iter(str(innermost).splitlines()), type(innermost).__name__)


def _column(split: Any, name: str, path: Path) -> list[str]:
    if name not in split.column_names:
        raise InputError(f"dataset: {path} has no column {name!r} (it has {', '.join(split.column_names)})")
    return list(_texts(split, name, path))


def _texts(split: Any, name: str, path: Path) -> Iterator[str]:
    try:
        for value in split[name]:
            if value is not None and not isinstance(value, str):
                raise InputError(f"dataset: column {name!r} of {path} holds {type(value).__name__}, not text")
            yield value or ""
    except UnicodeDecodeError as error:  # Parquet, whose texts nobody checked before
        raise InputError(f"dataset: column {name!r} of {path} is not UTF-8") from error
