"""One measurement in a process of its own: `python -m benchmarks.harness.worker TASK.json`, started by `Program`.

A process for each keeps the frameworks out of each other's memory, makes peaks mean something, and lets one fail alone.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

from newllm_jax.errors import InputError


def main(path: Path) -> None:
    """Calls the function that the task names with it; beside the task, writes what it returns, or the error's line."""
    task = json.loads(path.read_text())
    module, function = task["function"].split(":")
    try:
        result = getattr(importlib.import_module(module), function)(task)
    except InputError as error:
        result = {"input_error": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"error": (f"{type(error).__name__}: {error}".strip().splitlines() or ["?"])[0][:300]}
    path.with_suffix(".result").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
