"""Text sources: a Hub name, a local folder or file, or `builtin`; each gives rows of named text columns per split."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_jax.config import nearest
from newllm_jax.errors import InputError
from newllm_jax.sources.hub import HubOutOfReach, hub_folder

READERS = {  # file ending -> reader of the `datasets` library
    ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text",
}  # fmt: skip


@dataclass(frozen=True)
class TextSource:
    """Where rows come from. Opening one reads no rows: a prepared cache may make that needless.

    Attributes:
      asked: the source as the user named it.
      path: the local folder or file; None for the built-in text.
      configuration: which configuration of the folder is read ("" where it declares none).
      fallback: why another source replaced the one asked for; "" where none did.
      fingerprint: sha256 over the content, the same wherever the files lie.
    """

    asked: str
    path: Path | None
    configuration: str
    fallback: str
    fingerprint: str

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
          InputError: unreadable files, no `text` column, text that is not UTF-8, or no split to take rows from.
        """
        if self.path is None:
            return split_by_hash(builtin_paragraphs(), names)
        dataset = _read(self.path, self.configuration)
        present: dict[str, list[str]] = {}
        for name, split in dataset.items():
            present[_SPLIT_NAMES.get(str(name), str(name))] = _column(split, "text", self.path)
        if "train" not in present:
            raise InputError(f"dataset: {self.path} has no train split (it has {', '.join(dataset)})")
        missing = [name for name in names if name not in present]
        return present | split_by_hash(present["train"], ["train", *missing]) if missing else present

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, str]]:
        """The rows of the train split, in order, with these text columns; absent values are empty text.

        The built-in text has a row for each topic: its name in the first column, its text in the last.

        Raises:
          InputError: unreadable files, no train split, a column that is missing or holds no text.
        """
        if self.path is None:
            topics = builtin_topics()
            train = set(split_by_hash(topics.values(), ["train", "validation", "test"])["train"])
            for name, topic in topics.items():
                if topic in train:
                    yield {**dict.fromkeys(columns, ""), columns[0]: name, columns[-1]: topic}
            return
        dataset = _read(self.path, self.configuration)
        if "train" not in dataset:
            raise InputError(f"dataset: {self.path} has no train split (it has {', '.join(dataset)})")
        texts = [_column(dataset["train"], name, self.path) for name in columns]
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
      InputError: no such path or repository, an empty folder or file, an unknown or ambiguous configuration,
        a Hub that is out of reach where `fallback` is `error`.
    """
    if dataset == "builtin":
        return _builtin(dataset, "")
    path = Path(dataset).expanduser()
    if not dataset or not path.exists():
        if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")) or path.suffix in READERS:
            raise InputError(f"dataset: {dataset!r} does not exist (a folder, file, Hub name or builtin is expected)")
        configuration = configuration or hub_configuration
        try:
            path = _hub_snapshot(dataset, configuration)
        except HubOutOfReach as error:
            if fallback == "error" or path.parent.is_dir():  # `data/wikitxt` beside `data/wikitext` is a slip
                raise InputError(f"dataset: {error}; name a local folder or file that exists, or builtin") from error
            return _builtin(dataset, str(error))
    files = data_files(path)
    if not files:
        raise InputError(f"dataset: {path} has no data files ({', '.join(READERS)})")
    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"dataset: {file} is empty")
    configuration = _choose(_configurations(path), configuration, path)
    digest = hashlib.sha256(configuration.encode())
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return TextSource(dataset, path, configuration, "", digest.hexdigest())


def data_files(path: Path) -> list[Path]:
    """The files of a source that hold rows, or say how to read them, in a fixed order."""
    if path.is_file():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix in READERS and file.is_file()]
    visible = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return visible and [*visible, *(path / name for name in ("README.md",) if (path / name).is_file())]


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
    return TextSource(asked, None, "", fallback, digest)


def _hub_snapshot(repository: str, configuration: str) -> Path:
    """A Hub data set as a folder: only the configuration's own folder where the repository has one of that name."""
    if configuration:
        path = hub_folder(repository, "dataset", ["README.md", f"{configuration}/*"])
        if data_files(path):
            return path
    return hub_folder(repository, "dataset")


def _configurations(path: Path) -> list[str]:
    """The configurations that a folder's README declares."""
    if not (path / "README.md").is_file():
        return []
    from huggingface_hub import DatasetCard
    from yaml import YAMLError

    try:
        declared = DatasetCard.load(path / "README.md").data.to_dict().get("configs") or []
        return [str(entry["config_name"]) for entry in declared]
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(f"dataset: {path / 'README.md'} has a header that cannot be read ({error})") from error


def _choose(available: list[str], wanted: str, path: Path) -> str:
    if wanted and wanted not in available:
        known = nearest(wanted, available) if available else "; the source declares none"
        raise InputError(f"dataset_config: {path} has no configuration {wanted!r}{known}")
    if not wanted and len(available) > 1:
        raise InputError(f"dataset_config: {path} has several configurations, name one of: {', '.join(available)}")
    return wanted or (available[0] if available else "")


def _read(path: Path, configuration: str) -> Any:
    """The splits of a folder or file, as the `datasets` library reads them."""
    import datasets
    from datasets.exceptions import DatasetsError
    from datasets.utils import logging

    datasets.disable_progress_bars()
    loud = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs an error before it raises it
    try:
        if path.is_file():
            if path.suffix not in READERS:
                raise InputError(f"dataset: {path} is not one of {', '.join(READERS)}")
            return datasets.load_dataset(READERS[path.suffix], data_files={"train": str(path)}, **_options(path))
        return datasets.load_dataset(str(path), configuration or None)
    except InputError:
        raise
    except (DatasetsError, OSError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full or read-only disk is not the data set's fault
        _check_utf8(path)
        raise InputError(f"dataset: {path} cannot be read ({_reason(error)})") from error
    finally:
        logging.set_verbosity(loud)


def _check_utf8(path: Path) -> None:
    """Raises InputError naming the first text file that is not UTF-8: the readers' own messages name none."""
    for file in data_files(path):
        if file.suffix != ".parquet":
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise InputError(f"dataset: {file} is not UTF-8 (byte {byte:#04x} at {error.start})") from error


def _options(path: Path) -> dict[str, Any]:
    return {"delimiter": "\t"} if path.suffix == ".tsv" else {}


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: `datasets` wraps what really happened."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return next(iter(str(error).splitlines()), type(error).__name__)


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
