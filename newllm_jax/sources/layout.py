"""Which files of a folder hold the rows of which split: as its README says, else by the names that the Hub goes by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from newllm_jax.config import nearest
from newllm_jax.errors import InputError
from newllm_jax.files import read_text

READERS = {  # file ending -> reader of the `datasets` library
    ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text",
}  # fmt: skip
LARGEST_README = 2**20  # bytes; the header of one with hundreds of configurations has some 100,000
DESCRIPTIONS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}  # hold no rows
OPTIONS = {"sep", "delimiter", "column_names", "field", "sample_by"}  # of a configuration, for its reader
ENTRIES = {"config_name", "data_files", "data_dir", "default", "version", "description"}  # and what else it may have

# The conventions of the Hub, the first that fits: shards in `data`, splits named by folders, by files, or not at all.
SHARD = re.compile(r"data/(?P<split>[^/]+)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
FOLDER_PATTERNS = (
    "**/{0}/**", "**/{0}[-._ 0-9]*/**", "**/*[-._ 0-9]{0}/**", "**/*[-._ 0-9]{0}[-._ 0-9]*/**",
)  # fmt: skip
FILE_PATTERNS = "**/{0}[-._ 0-9]*", "**/*[-._ 0-9]{0}[-._ 0-9]*"


@dataclass(frozen=True)
class Layout:
    """The files of a source that are read, and how.

    Attributes:
      configuration: the one that is read ("" where the source declares none).
      splits: the files of each split, in the order of reading.
      readme: what says so; None where nothing does.
      options: for the reader of the `datasets` library.
    """

    configuration: str
    splits: Mapping[str, Sequence[Path]]
    readme: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """All of them, each once, in a fixed order."""
        rows = sorted({file for files in self.splits.values() for file in files})
        return [*rows, self.readme] if self.readme else rows

    @property
    def reader(self) -> str:
        """The name of the reader in the `datasets` library."""
        return READERS[next(iter(self.splits.values()))[0].suffix]


def read_layout(path: Path, configuration: str) -> Layout:
    """Finds the files of a source without reading their rows.

    Args:
      path: a file, or a folder.
      configuration: the one to read where a folder declares several; "" for the only one.

    Raises:
      InputError: no data files, or of several kinds; a link that leaves the folder; an unknown or ambiguous
        configuration; a README that cannot be read, or that names what is no data file of the folder.
    """
    if path.is_file():
        if path.suffix not in READERS:
            raise InputError(f"dataset: {path} is not one of {', '.join(READERS)}")
        _choose([], configuration, path)
        return Layout("", {"train": [path]}, options=_default_options(path.suffix))
    files = {file.relative_to(path).as_posix(): file for file in data_files(path)}
    readme = files.pop("README.md", None)
    if not files:
        raise InputError(f"dataset: {path} has no data files ({', '.join(READERS)})")
    entries = _declared(readme) if readme else {}
    configuration = _choose(list(entries), configuration, path)
    names = _split_names(path, sorted(files), entries.get(configuration, {}))
    splits = {split: [files[name] for name in found] for split, found in names.items()}
    options = {name: value for name, value in entries.get(configuration, {}).items() if name in OPTIONS}
    kinds = sorted({file.suffix for split in splits.values() for file in split})
    if len({(READERS[kind], kind == ".tsv") for kind in kinds}) > 1:
        raise InputError(f"dataset: {path} has rows in files of several kinds ({', '.join(kinds)}); name one file, "
                         "or those to read in the configs of its README.md")  # fmt: skip
    layout = Layout(configuration, splits, readme, {**_default_options(kinds[0]), **options})
    for file in layout.files:
        _check_inside(file, path)
    return layout


def data_files(path: Path) -> list[Path]:
    """The files of a source that can hold rows, or say how to read them, in a fixed order."""
    if path.is_file():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix in READERS and file.name not in DESCRIPTIONS]
    rows = [file for file in found if file.is_file() and not _is_hidden(file.relative_to(path))]
    return rows and [*rows, *(path / name for name in ("README.md",) if (path / name).is_file())]


def _is_hidden(name: Path) -> bool:
    return any(part.startswith((".", "__")) for part in name.parts)


def _default_options(ending: str) -> dict[str, Any]:
    return {"sep": "\t"} if ending == ".tsv" else {}


def _check_inside(file: Path, folder: Path) -> None:
    """Raises InputError where a link leads out of its folder, except to the files of a repository in the Hub's cache.

    There, `snapshots/<commit>/train.txt` is a link to `blobs/<hash>`.
    """
    real, allowed = file.resolve(), [folder.resolve()]
    allowed += [up.parent / "blobs" for up in allowed[0].parents if up.name == "snapshots"]
    if not any(real.is_relative_to(inside) for inside in allowed):
        raise InputError(f"dataset: {file} is a link that leaves the folder; put a copy there, or name {real.parent}")


def _declared(readme: Path) -> dict[str, dict[str, Any]]:
    """The configurations that a README declares in its header, by name."""
    import yaml

    try:
        declared = (yaml.safe_load(_header(read_text(readme, LARGEST_README))) or {}).get("configs") or []
        entries = {_text(entry["config_name"]): entry for entry in declared}
        if len(entries) < len(declared):
            raise ValueError("two configurations of one name")
        for name, entry in entries.items():
            if unknown := [key for key in entry if key not in ENTRIES | OPTIONS]:
                raise ValueError(f"configuration {name} has an entry {unknown[0]!r}, which is not supported")
            _patterns(entry.get("data_files"))
            _text(entry.get("data_dir") or "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"dataset: {readme} has a header that cannot be read ({_one_line(error)})") from error
    return entries


def _header(text: str) -> str:
    """What stands between the first line of a README and the next one, where both are `---`; "" otherwise."""
    lines = text.lstrip().splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return ""
    return "\n".join(lines[1 : lines.index("---", 1)])


def _choose(available: list[str], wanted: str, path: Path) -> str:
    if wanted and wanted not in available:
        known = nearest(wanted, available) if available else "; the source declares none"
        raise InputError(f"dataset_config: {path} has no configuration {wanted!r}{known}")
    if not wanted and len(available) > 1:
        raise InputError(f"dataset_config: {path} has several configurations, name one of: {', '.join(available)}")
    return wanted or (available[0] if available else "")


def _patterns(declared: Any) -> dict[str, list[str]]:
    """The patterns of each split, of a configuration's `data_files`; of none where there are no `data_files`.

    Raises:
      ValueError, KeyError, TypeError: neither a text, nor a list of texts, nor one of `{split, path}`.
    """
    if declared is None:
        return {}
    declared = [declared] if isinstance(declared, str) else list(declared)
    if not declared:
        raise ValueError("data_files without a file")
    if not any(isinstance(each, dict) for each in declared):
        return {"train": list(map(_text, declared))}
    patterns = {
        _text(each["split"]): list(map(_text, each["path"] if isinstance(each["path"], list) else [each["path"]]))
        for each in declared
    }
    if len(patterns) < len(declared) or not all(patterns.values()):
        raise ValueError("data_files with two entries for one split, or with none")
    return patterns


def _text(value: Any) -> str:
    """A name or path of a header, where a number or a date may stand for a text: never what holds others."""
    if isinstance(value, (dict, list, set, type(None))):
        raise TypeError(f"a text is expected, not {type(value).__name__}")
    return str(value)


def _split_names(path: Path, names: list[str], entry: Mapping[str, Any]) -> dict[str, list[str]]:
    """The files of each split of a configuration. Raises InputError where the README names others than `names`."""

    def check(found: list[str], named: str) -> list[str]:
        if not found:
            raise InputError(f"dataset: {path / 'README.md'} names {named!r}, which is no data file of {path} "
                             f"({', '.join(READERS)})")  # fmt: skip
        return found

    inside = "".join(f"{part}/" for part in Path(_text(entry.get("data_dir") or "")).parts)
    below = check([name.removeprefix(inside) for name in names if name.startswith(inside)], inside)
    patterns = _patterns(entry.get("data_files"))
    splits = _conventional(below) if not patterns else {
        split: _unique(check(_matching(pattern, below), inside + pattern) for pattern in each)
        for split, each in patterns.items()
    }  # fmt: skip
    return {split: [inside + name for name in found] for split, found in splits.items()}


def _conventional(names: list[str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name in names:
        if shard := SHARD.fullmatch(name):
            shards.setdefault(shard["split"], []).append(name)
    if shards:
        return shards
    for patterns in (FOLDER_PATTERNS, FILE_PATTERNS):
        splits = {
            split: _unique(
                _matching(pattern.format(word), [name for name in names if word in name])
                for word in words
                for pattern in patterns
            )
            for split, words in KEYWORDS.items()
        }
        if any(splits.values()):
            return {split: found for split, found in splits.items() if found}
    return {"train": names}


def _unique(found: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in found for name in names))


def _matching(pattern: str, names: list[str]) -> list[str]:
    """The names that a pattern of the Hub fits: as a shell's, and `**` stands for any folders, at the end for files."""
    parts = Path(pattern).parts  # without `./` and doubled slashes; `..` stays and fits nothing
    return [name for name in names if _fits(name.split("/"), parts)]


def _fits(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a pattern, both in parts: row by row, which of the first parts of the name are used up."""
    reached = [True] + [False] * len(name)
    for number, part in enumerate(pattern):
        if part == "**":
            first = reached.index(True) + (number == len(pattern) - 1) if True in reached else len(reached)
            reached = [index >= first for index in range(len(reached))]
        else:
            reached = [False] + [
                before and fnmatchcase(each, part) for before, each in zip(reached, name, strict=False)
            ]
    return reached[-1]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
