"""The text columns of files: written once as Arrow files, which are mapped into memory, and read a few rows at a time.

The `datasets` library does so for all kinds of files but Parquet, of which it lets Arrow read up to a gigabyte ahead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_jax.errors import InputError, causes, disk_fault
from newllm_jax.sources.layout import Layout

ROWS_AT_ONCE = 100


@dataclass(frozen=True)
class Column:
    """The texts of a column, read anew each time that they are iterated; absent values are empty text.

    Attributes:
      parts: the rows, several `datasets.Dataset`.
      name: of the column.
      path: of the source, for errors.

    Raises:
      InputError: while iterated, where a value is no text, or not UTF-8.
    """

    parts: Sequence[Any]
    name: str
    path: Path

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[str]:
        try:
            for rows in self.parts:
                for table in rows.select_columns([self.name]).with_format("arrow").iter(ROWS_AT_ONCE):
                    yield from map(self._text, table.column(0).to_pylist())
        except UnicodeDecodeError as error:  # Parquet, whose texts nobody checked before
            raise InputError(f"dataset: column {self.name!r} of {self.path} is not UTF-8") from error

    def _text(self, value: object) -> str:
        if value is not None and not isinstance(value, str):
            found = type(value).__name__
            raise InputError(f"dataset: column {self.name!r} of {self.path} holds {found}, not text")
        return value or ""


@contextmanager
def open_columns(path: Path, files: Sequence[Path], layout: Layout, names: Sequence[str]) -> Iterator[list[Column]]:
    """The columns of some files, which can be read until the context ends. The files themselves are read by then.

    The library writes them as Arrow files, which it maps into memory. Its cache knows a file by its name and the time
    of its last change, so each reading has a cache of its own. And it takes a name for a pattern, or for a path within
    an archive, so it is told of links with plain names.

    Args:
      path: of the source, for errors.

    Raises:
      InputError: files that cannot be read, or that lack a column.
    """
    with tempfile.TemporaryDirectory() as folder:
        parts = _read(path, files, layout, names, Path(folder))
        for rows in parts:
            _check_columns(path, rows.column_names, names)
        yield [Column(parts, name, path) for name in names]


def _check_columns(path: Path, there: Sequence[str], names: Sequence[str]) -> None:
    for name in names:
        if name not in there:
            raise InputError(f"dataset: {path} has no column {name!r} (it has {', '.join(there)})")


def _read(path: Path, files: Sequence[Path], layout: Layout, names: Sequence[str], folder: Path) -> list[Any]:
    """The rows of some files: several `datasets.Dataset`, whose files lie in `folder`."""
    import datasets
    from datasets.utils import logging

    datasets.disable_progress_bars()
    loud = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs an error before it raises it
    try:
        links = [folder / f"{number:05}{file.suffix}" for number, file in enumerate(files)]
        for link, file in zip(links, files, strict=True):
            link.symlink_to(file.resolve())
        if layout.reader == "parquet" and not layout.options:
            return [datasets.Dataset.from_file(str(_as_arrow(path, link, names))) for link in links]
        read = getattr(datasets.Dataset, f"from_{layout.reader}")
        return [read(list(map(str, links)), cache_dir=str(folder), **layout.options)]
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        if disk_fault(error):
            raise  # not the data set's fault
        _check_utf8(files)
        raise InputError(f"dataset: {path} cannot be read ({_reason(error)})") from error
    finally:
        logging.set_verbosity(loud)


def _as_arrow(path: Path, file: Path, names: Sequence[str]) -> Path:
    """The columns of a Parquet file as an Arrow file beside it. One row group is in memory at a time, compressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as source:
        _check_columns(path, source.schema_arrow.names, names)
        columns = list(dict.fromkeys(names))
        schema = pa.schema([source.schema_arrow.field(name) for name in columns])
        target = file.with_suffix(".arrow")
        with pa.ipc.new_stream(str(target), schema) as stream:
            for batch in source.iter_batches(ROWS_AT_ONCE, columns=columns):
                stream.write_batch(batch.select(columns))
    return target


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
