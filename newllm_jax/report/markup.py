"""Markdown of texts that users choose (names, paths, commands) and of text that models write: shown, never obeyed."""

from __future__ import annotations

import re
import unicodedata

SPECIAL = re.compile(r"[\\`*\[\]<>|&$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")


def escaped(text: object) -> str:
    """A text on one line, in which nothing is Markdown: neither emphasis nor HTML nor the end of a table's cell."""
    return SPECIAL.sub(r"\\\g<0>", " ".join(visible(str(text)).split()))


def fenced(text: str, language: str = "text") -> str:
    """A block of text as it is. Its fence is longer than any row of backticks in it."""
    longest = max((len(row) for row in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def visible(text: str) -> str:
    """A text whose control characters, line breaks apart, are replaced by the sign for a letter that is unknown."""
    return "".join(
        "\ufffd" if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" else letter for letter in text
    )
