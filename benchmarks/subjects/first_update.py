"""A run that ends after its first update: `python -m benchmarks.subjects.first_update MARK train --config baseline`.

The command line is the library's own. Nothing is imported ahead of it, so that the time is that of a user's run: a
thread waits until the library has loaded its progress report, and has it write the time of its first call to MARK.
The exit code is 0 then, and that of the run where it ends before.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

HOME = "newllm_jax.records.progress"
POLL_SECONDS = 0.002


class Reached(BaseException):
    """The first update has ended; no error that the library would look into."""


def watch(mark: Path) -> None:
    """Replaces what the training loop calls after its first piece, which is one update."""

    def stop(*_: Any, **__: Any) -> NoReturn:
        mark.write_text(repr(time.time()))
        raise Reached

    while not hasattr(sys.modules.get(HOME), "TrainingProgress"):
        time.sleep(POLL_SECONDS)
    sys.modules[HOME].TrainingProgress.progress = stop


def main(argv: Sequence[str]) -> int:
    """Runs the command; its exit code, or 0 after the first update."""
    threading.Thread(target=watch, args=(Path(argv[0]),), daemon=True).start()
    from newllm_jax.cli.process import main as command_line

    try:
        return command_line(argv[1:])
    except Reached:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
