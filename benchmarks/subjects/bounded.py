"""A CASCADE on synthetic rows, in a process that may have so much memory and no more, watched while it runs."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from newllm_jax.smollm.llama_config import LlamaConfig

SECONDS = 0.05  # between two looks
WORDS = 4096  # different ones
SHORTEST, LONGEST = 20, 260  # bytes of a row: two of three have a chunk of 129, of Alpaca's one of twenty


def write_rows(file: Path, rows: int, longest: int = LONGEST) -> None:
    """Rows of random words, as JSON lines; the same for the same numbers.

    Args:
      longest: bytes of a row, about.
    """
    draw = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlu", "S1").astype(str)
    words = ["".join(draw.choice(letters, draw.integers(2, 9))) for _ in range(WORDS)]
    with file.open("w") as stream:
        for start in range(0, rows, 10_000):
            lengths = draw.integers(SHORTEST, longest, min(10_000, rows - start))
            chosen = draw.integers(0, WORDS, (len(lengths), longest // 3))
            for length, picked in zip(lengths, chosen, strict=True):
                text = " ".join(words[index] for index in picked)[:length]
                stream.write(json.dumps({"instruction": "Say", "input": "", "output": text}) + "\n")


def base_of_width(width: int) -> LlamaConfig:
    """A Llama of one narrow layer that reads bytes: hidden states as large as wanted, and little to compute."""
    return LlamaConfig(
        vocab_size=257, hidden_size=width, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8
    )


class Watch:
    """What a process has at most while it runs.

    Attributes:
      anonymous: bytes of memory that is no part of a file, and cannot be given back.
      disk: bytes of the files in a folder, those without a name included.
    """

    def __init__(self, folder: Path) -> None:
        self.anonymous = self.disk = 0
        self._folder, self._over = folder.resolve(), threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Looks again and again until the block ends."""
        self._over.clear()
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _look(self) -> None:
        while not self._over.is_set():
            self.anonymous = max(self.anonymous, anonymous_bytes())
            self.disk = max(self.disk, disk_bytes(self._folder))
            time.sleep(SECONDS)


def anonymous_bytes() -> int:
    """Bytes of this process's memory that are no part of a file. Linux only."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def disk_bytes(folder: Path) -> int:
    """Bytes on disk of the hidden states in a folder, and of files without a name that this process has open there."""
    sizes = dict[int, int]()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if str(descriptor.readlink()).startswith(str(folder)):
                found = descriptor.stat()
                sizes[found.st_ino] = found.st_blocks * 512
    for file in folder.glob("*/extraction/*"):
        with suppress(OSError):
            sizes[file.stat().st_ino] = file.stat().st_blocks * 512
    return sum(sizes.values())


def hold(size: int) -> None:
    """This process may have so many bytes of memory that is no part of a file; asking for more fails. Linux only."""
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """A run within the bound of the task, and what it needed."""
    hold(task["bound"])
    from newllm_jax.cascade.experiment import train_cascade
    from newllm_jax.config import CascadeConfig

    config, runs = CascadeConfig.from_dict(task["config"]), Path(task["folder"]) / "runs"
    watch, started = Watch(runs), time.monotonic()
    with watch.watching():
        results = train_cascade(config, run_root=runs).results
    stages = results["stages"]
    return {
        "tokens": results["data"]["train_tokens"] + results["data"]["val_tokens"],
        "hard_tokens": [stage["train_tokens"] + stage["val_tokens"] for stage in stages],
        "val_loss": [row["val_loss"] for row in results["ensemble"]],
        "disk_bytes": watch.disk,
        "peak_bytes": watch.anonymous,
        "peak_resident_bytes": results["peak_memory_bytes"],
        "seconds": time.monotonic() - started,
        "stage_seconds": [stage["seconds"] for stage in stages],
    }
