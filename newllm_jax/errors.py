"""The two ways a run can end badly that are the user's to know about, those that are the machine's, and a stop.

Any other exception is a bug of the library and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import reprlib
from collections.abc import Iterator

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
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


def memory_fault(error: BaseException) -> str | None:
    """How much was asked for ("40.00 GiB"), where an error or one of its causes is memory that ran out; else None.

    "more" where the error does not tell the size.
    """
    full = [each for each in causes(error) if isinstance(each, MemoryError) or "RESOURCE_EXHAUSTED" in str(each)]
    if not full or disk_fault(error):
        return None
    said = " ".join(map(str, full))
    found = re.search(
        rf"allocat\w* (?:request for )?(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", said
    )  # as XLA and NumPy say it
    return f"{float(found[1]) * UNITS[found[2]] / 2**30:.2f} GiB" if found else "more"
