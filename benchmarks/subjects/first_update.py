"""A run that ends after its first update: `python -m benchmarks.subjects.first_update MARK train --config baseline`.

The command line is the library's own. Nothing is imported ahead of it, so that the time is that of a user's run: a
thread waits until the library has loaded its progress report, and has it write the time of its first call to MARK.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

HOME = "newllm_jax.records.progress"
POLL_SECONDS = 0.002


def watch(mark: Path) -> None:
    """Replaces what the training loop calls after its first piece, which is one update."""

    def stop(*_: Any, **__: Any) -> NoReturn:
        mark.write_text(repr(time.time()))
        raise KeyboardInterrupt

    while not hasattr(sys.modules.get(HOME), "TrainingProgress"):
        time.sleep(POLL_SECONDS)
    sys.modules[HOME].TrainingProgress.progress = stop


def main() -> int:
    """Runs the command; its exit code, 130 where all went well."""
    threading.Thread(target=watch, args=(Path(sys.argv[1]),), daemon=True).start()
    from newllm_jax.cli.process import main as command_line

    return command_line(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
