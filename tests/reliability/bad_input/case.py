"""One bad input, and the state of the folder in which it is tried."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FOLDER, PIPE, GONE = "\0folder", "\0pipe", "\0gone"


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
      says: what the error's one line must contain, in pieces that ` ... ` separates; of an accepted input, what its
        output must.
      typed: the command.
      call: instead of one, a Python expression over the public names.
      files: what lies in the folder beside the sources and runs, or is changed in them, by path.
      environment: variables.
      run: the copy of which run, or of which exported model, lies in `run`.
      code: the exit code.
    """

    says: str
    typed: tuple[str, ...] = ()
    call: str = ""
    files: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    run: Literal["", "train", "cascade", "finetune", "exported", "exported_finetune"] = ""
    code: int = 2

    @property
    def name(self) -> str:
        """What is tried, in a line of at most some 100 characters."""
        typed = self.call or " ".join(repr(word) if not word or " " in word else word for word in self.typed)
        changed = ", ".join(f"{path}: {_short(content)}" for path, content in self.files.items())
        variables = "".join(f"{name}={value} " for name, value in self.environment.items())
        return _printable(f"{variables}{typed}{f'   with {changed}' if changed else ''}")

    def prepare(self, folder: Path) -> None:
        """Makes the files."""
        for path, content in self.files.items():
            place(folder / path, content)


def place(path: Path, content: Any) -> None:
    """Puts something at a path: a text, bytes, FOLDER, PIPE, a Link, nothing (GONE), or what a function makes of what
    lay there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if callable(content) else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if content == FOLDER:
        path.mkdir()
    elif content == PIPE:
        os.mkfifo(path)
    elif isinstance(content, Link):
        path.symlink_to(content.target)
    elif content != GONE:
        content = content(before) if callable(content) else content
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def _short(content: Any) -> str:
    if isinstance(content, str) and content.startswith("\0"):
        return content[1:]
    if callable(content):
        return str(content.__doc__)
    shown = repr(content)
    return shown if len(shown) < 60 else f"{shown[:40]}... ({len(content)})"


def _printable(text: str) -> str:
    text = " ".join(text.encode("ascii", "backslashreplace").decode().replace("\0", "\\0").split())
    return text if len(text) <= 160 else f"{text[:110]}...{text[-30:]}"
