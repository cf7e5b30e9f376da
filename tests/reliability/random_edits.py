"""Damages of files and folders, by chance, for `damages.py`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path


def _edit(file: Path, change: Callable[[bytearray, random.Random], None], draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    change(content, draw)
    file.write_bytes(content)


def flip_a_bit(content: bytearray, draw: random.Random) -> None:
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def zero_a_block(content: bytearray, draw: random.Random) -> None:
    start, size = draw.randrange(len(content) + 1), draw.choice([1, 16, 512])
    content[start : start + size] = bytes(len(content[start : start + size]))


def randomise_a_block(content: bytearray, draw: random.Random) -> None:
    start, size = draw.randrange(len(content) + 1), draw.choice([1, 16, 512])
    content[start : start + size] = draw.randbytes(len(content[start : start + size]))


def truncate(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content) + 1) :]


def append(content: bytearray, draw: random.Random) -> None:
    content += draw.randbytes(draw.choice([1, 100]))


def change_a_digit(content: bytearray, draw: random.Random) -> None:
    digits = [place for place, byte in enumerate(content) if 48 <= byte < 58]
    if digits:
        place = draw.choice(digits)
        content[place] = ord(str((int(chr(content[place])) + draw.randint(1, 9)) % 10))


EDITS = [flip_a_bit, zero_a_block, randomise_a_block, truncate, append, change_a_digit]


def _swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def damage(copy: Path, foreign: Path, draw: random.Random) -> str:
    """Damages one file or folder of `copy`; returns what it did.

    Args:
      foreign: a run of the same settings but for its seed, for parts that do not belong here.
    """
    paths = sorted(
        path for path in copy.rglob("*") if path.name not in (".lock", "report.md", "report.html", "curves.png")
    )
    files = [path for path in paths if path.is_file()]
    folders = [path for path in paths if path.is_dir()]
    way = draw.choices(["edit", "delete", "foreign", "swap", "folder"], [10, 2, 2, 2, 3])[0]
    if way == "folder" and folders:
        folder = draw.choice(folders)
        siblings = [path for path in folders if path.parent == folder.parent and path != folder]
        cousins = [path for path in folders if path.name == folder.name and path != folder]
        theirs = foreign / folder.relative_to(copy)
        what = draw.choice(["delete", "swap", "swap", "foreign", "foreign"])
        if what == "swap" and siblings + cousins:
            other = draw.choice(siblings + cousins)
            if folder not in other.parents and other not in folder.parents:
                _swap(folder, other)
                return f"swap {folder.relative_to(copy)} and {other.relative_to(copy)}"
        if what == "foreign" and theirs.is_dir():
            shutil.rmtree(folder)
            shutil.copytree(theirs, folder)
            return f"another run's {folder.relative_to(copy)}"
        shutil.rmtree(folder)
        return f"delete {folder.relative_to(copy)}"
    file = draw.choice(files)
    name = file.relative_to(copy).as_posix()
    theirs = foreign / name
    if way == "delete":
        file.unlink()
        return f"delete {name}"
    if way == "foreign" and theirs.is_file():
        shutil.copy(theirs, file)
        return f"another run's {name}"
    if way == "swap":
        other = draw.choice(files)
        if other != file:
            _swap(file, other)
            return f"swap {name} and {other.relative_to(copy)}"
    edit = draw.choice(EDITS)
    _edit(file, edit, draw)
    return f"{edit.__name__.replace('_', ' ')} of {name}"
