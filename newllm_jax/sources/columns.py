"""The text columns of files, as the `datasets` library reads them: from Arrow files on disk, a few rows at a time."""

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
      rows: a `datasets.Dataset`.
      name: of the column.
      path: of the source, for errors.

    Raises:
      InputError: while iterated, where a value is no text, or not UTF-8.
    """

    rows: Any
    name: str
    path: Path

    def __iter__(self) -> Iterator[str]:
        rows = self.rows.select_columns([self.name]).with_format("arrow")
        try:
            for table in rows.iter(ROWS_AT_ONCE):
                for value in table.column(0).to_pylist():
                    if value is not None and not isinstance(value, str):
                        found = type(value).__name__
                        raise InputError(f"dataset: column {self.name!r} of {self.path} holds {found}, not text")
                    yield value or ""
        except UnicodeDecodeError as error:  # Parquet, whose texts nobody checked before
            raise InputError(f"dataset: column {self.name!r} of {self.path} is not UTF-8") from error


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
        rows = _read(path, files, layout, Path(folder))
        for name in names:
            if name not in rows.column_names:
                raise InputError(f"dataset: {path} has no column {name!r} (it has {', '.join(rows.column_names)})")
        yield [Column(rows, name, path) for name in names]


def _read(path: Path, files: Sequence[Path], layout: Layout, folder: Path) -> Any:
    """The rows of some files, a `datasets.Dataset` whose files lie in `folder`."""
    import datasets
    from datasets.utils import logging

    datasets.disable_progress_bars()
    loud = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs an error before it raises it
    try:
        links = [folder / f"{number:05}{file.suffix}" for number, file in enumerate(files)]
        for link, file in zip(links, files, strict=True):
            link.symlink_to(file.resolve())
        read = getattr(datasets.Dataset, f"from_{layout.reader}")
        return read(list(map(str, links)), cache_dir=str(folder), **layout.options)
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
