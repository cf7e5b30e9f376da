"""Coverage-guided fuzzing of the readers of untrusted files: `python -m tests.reliability.fuzz`.

Every input is read or refused by an InputError of one line; anything else is a failure, and its input is saved. Atheris
(`pip install -e '.[fuzz]'`; Python 3.11 to 3.13 on Linux) makes the inputs: it follows the edges of the readers' Python
code, of the `gguf` package's and of `tomllib`'s. What is in Rust, `safetensors` and `tokenizers`, it sees from outside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.reliability.tiny import CHECKOUT

READERS = ("gguf", "safetensors", "json")
INSTRUMENTED = ["gguf", "tomllib", "newllm_jax.files", "newllm_jax.smollm", "newllm_jax.config", "newllm_jax.records",
                "newllm_jax.report", "newllm_jax.newllm.wikitext"]  # fmt: skip
OUTPUT = CHECKOUT / "docs" / "results" / "reliability" / "fuzz.json"
LONGEST = 16_384  # bytes of an input
SECONDS_AN_INPUT, MEGABYTES = 30, 2048  # beyond these an input is a failure
LONGEST_LINE = 2000  # characters of an error
EVERY = 1000  # inputs between two writes of the statistics: the process ends without a word


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzzes the readers one after another. Returns 1 where an input failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000, help="inputs for each reader")
    parser.add_argument("--reader", choices=READERS, help="one reader only; writes no results")
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="folder for inputs that failed")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)  # the process that `fuzz` starts
    arguments = parser.parse_args(argv)
    if arguments.inside:
        name, corpus, statistics = arguments.inside
        run_atheris(name, Path(corpus), Path(statistics), arguments)
    found = {}
    for name in [arguments.reader] if arguments.reader else READERS:
        found[name] = fuzz(name, arguments)
        print(name, json.dumps(found[name]), flush=True)
    if not arguments.reader:
        content = {
            "command": f"python -m tests.reliability.fuzz --inputs {arguments.inputs} --seed {arguments.seed}",
            "python": platform.python_version(),
            **{package: version(package) for package in ("atheris", "gguf", "safetensors", "tokenizers")},
            "readers": found,
        }
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        OUTPUT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return int(any(result["failed"] for result in found.values()))


def fuzz(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fuzzes one reader in a process of its own.

    Returns:
      `inputs`, `seconds`, `edges` and `features` of the code that were reached (a feature is an edge and how often),
      `corpus` (inputs that reached something new), `read`, `refused`, `failed`, `slowest_ms`, `peak_memory_bytes`.
    """
    with tempfile.TemporaryDirectory() as folder:
        corpus, statistics = Path(folder) / "corpus", Path(folder) / "statistics.json"
        corpus.mkdir()
        arguments.failures.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "tests.reliability.fuzz", "--inputs", str(arguments.inputs), "--seed",
            str(arguments.seed), "--failures", str(arguments.failures), "--inside", name, str(corpus), str(statistics),
        ]  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(command, cwd=CHECKOUT, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
        reached = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)/", done.stderr)
        if not statistics.is_file() or not reached:
            raise SystemExit(f"{name}: the fuzzer did not start\n{done.stderr[-2000:]}")
        result = {**json.loads(statistics.read_text()), "seconds": round(time.monotonic() - start)}
        if done.returncode:  # an input that took too long or too much, or killed the process
            print(done.stderr[-2000:], file=sys.stderr)
            result["failed"] += 1
        return result | dict(zip(("edges", "features", "corpus"), map(int, reached[-1]), strict=True))


def run_atheris(name: str, corpus: Path, statistics: Path, arguments: argparse.Namespace) -> None:
    """Fuzzes a reader in this process, which ends in here."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.reliability.fuzz_readers import WORDS, readers, scratch

    warnings.simplefilter("error")  # a warning is a line that nobody asked for
    with scratch() as folder:
        reader = readers(Path(folder))[name]
        for number, seed in enumerate(reader.seeds):
            reader.read(seed)
            (corpus / str(number)).write_bytes(seed)
        words = corpus.parent / "words"
        escaped = ("".join(f"\\x{byte:02x}" for byte in word[:60]) for word in WORDS)  # libFuzzer has no longer ones
        words.write_text("".join(f'"{word}"\n' for word in escaped))
        log = Log(name, statistics, arguments)

        def change(content: bytes, longest: int, seed: int) -> bytes:
            """Half of the changes are libFuzzer's; a quarter start from a valid file, from which few are far."""
            draw = random.Random(seed)
            if draw.randrange(2):
                return atheris.Mutate(content, longest)
            return reader.change(draw.choice([content, draw.choice(reader.seeds)]), draw)[:longest]

        atheris.Setup(
            [
                sys.argv[0], f"-runs={arguments.inputs}", f"-seed={arguments.seed}", f"-max_len={LONGEST}",
                "-len_control=0",
                f"-timeout={SECONDS_AN_INPUT}", f"-rss_limit_mb={MEGABYTES}", f"-dict={words}",
                f"-artifact_prefix={arguments.failures}/{name}-", str(corpus),
            ],
            lambda content: log.outcome(reader.read, content),
            custom_mutator=change,
        )  # fmt: skip
        atheris.Fuzz()


class Log:
    """Counts outcomes, saves inputs that fail, and writes the statistics from time to time and at the last input."""

    def __init__(self, name: str, statistics: Path, arguments: argparse.Namespace) -> None:
        self.name, self.statistics, self.last, self.failures = name, statistics, arguments.inputs, arguments.failures
        self.counts = {"inputs": 0, "read": 0, "refused": 0, "failed": 0}
        self.slowest = 0.0

    def outcome(self, read: Any, content: bytes) -> None:
        """Reads an input."""
        start = time.perf_counter()
        fault = outcome(read, content)
        self.slowest = max(self.slowest, time.perf_counter() - start)
        self.counts["inputs"] += 1
        self.counts[fault if fault in self.counts else "failed"] += 1
        if fault not in self.counts:
            file = self.failures / f"{self.name}-{hashlib.sha256(content).hexdigest()[:12]}"
            file.write_bytes(content)
            file.with_suffix(".txt").write_text(fault, encoding="utf-8", errors="replace")
        if self.counts["inputs"] % EVERY == 0 or self.counts["inputs"] == self.last:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            result = {**self.counts, "slowest_ms": round(self.slowest * 1000), "peak_memory_bytes": peak}
            self.statistics.write_text(json.dumps(result))


def outcome(read: Any, content: bytes) -> str:
    """`read`, `refused`, or what was wrong: a traceback, or an error of more than one line."""
    from newllm_jax.errors import InputError

    try:
        read(content)
    except InputError as error:
        said = str(error)
        return "refused" if "\n" not in said and len(said) < LONGEST_LINE else f"no single line: {said!r}"
    except BaseException:  # a panic of Rust is no Exception
        return traceback.format_exc()
    return "read"


if __name__ == "__main__":
    sys.exit(main())
