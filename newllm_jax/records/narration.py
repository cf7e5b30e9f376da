"""What a run tells as it goes: lines for people, or the same as events, one JSON object a line, for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from newllm_jax.content import finite

Narrate: TypeAlias = Callable[[str], None]  # takes a line that tells what a run does


class JsonLines:
    """A `narrate` that writes events: `{"event": "epoch", "epoch": 1, ...}`; a mere line is a `note`.

    Args:
      write: takes a line.
    """

    def __init__(self, write: Narrate = print) -> None:
        self._write = write

    def __call__(self, line: str) -> None:
        self.event("note", {"text": line})

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Writes an event. A number that is not finite becomes null."""
        self._write(json.dumps({"event": name, **finite(dict(facts))}, ensure_ascii=False))


def tell(narrate: Narrate, event: str, lines: str | Sequence[str], facts: Mapping[str, Any]) -> None:
    """Tells something in one line or several, or with its facts to a `narrate` that takes events."""
    if isinstance(narrate, JsonLines):
        narrate.event(event, facts)
    else:
        for each in [lines] if isinstance(lines, str) else lines:
            narrate(each)


def warn(narrate: Narrate, text: str) -> None:
    """Tells a warning, as a line in a box."""
    tell(narrate, "warning", boxed(text), {"text": text})


def boxed(text: str, width: int = 96) -> str:
    """A warning that cannot be overlooked."""
    rule = "+" + "-" * (width + 2) + "+"
    return "\n".join([rule, *(f"| {line:<{width}} |" for line in textwrap.wrap(text, width)), rule])
