"""The two ways a run can end badly that are the user's to know about, the one that is the disk's, and a stop.

Any other exception is a bug of the library and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import reprlib
from collections.abc import Iterator

DISK_ERRORS = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]


class InputError(ValueError):
    """A setting, file or folder that cannot be used: one line that names it, what is wrong and what to do."""

    exit_code = 2


class NumericalError(ArithmeticError):
    """A run that failed by its numbers (a NaN or infinite loss): one line that says where and what is kept."""

    exit_code = 3


class Note(UserWarning):
    """Something that did not stop the work and that the user should know, in one line: what replaced a damaged file."""


class Stopped(Exception):
    """A run that ended before its last epoch because it was asked to, or had no time left: resuming continues it."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """A value as a message shows it: in one line, the middle of a long one left out."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"{type(value).__name__} of too many digits"


def named(name: object) -> str:
    """A name as a message begins with it: as it is, or as `shown` does where it would be hard to see or to read."""
    plain = isinstance(name, str) and name.isprintable() and name == name.strip() and 0 < len(name) <= 80
    return str(name) if plain else shown(name)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def disk_fault(error: BaseException) -> str | None:
    """What the system said, where an error or one of its causes is a disk that takes no more; else None."""
    said = [str(cause) for cause in causes(error)]  # an OSError names the fault, and so do the libraries that wrap one
    return next((fault for fault in DISK_ERRORS if any(fault in text for text in said)), None)


def memory_fault(error: BaseException) -> bool:
    """Whether an error or one of its causes is memory that does not suffice, the device's or the machine's."""
    return any("RESOURCE_EXHAUSTED" in str(cause) or isinstance(cause, MemoryError) for cause in causes(error))
