"""What the benchmark programs share: options, one line for bad input, measurements in processes, a JSON file."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from newllm_jax.cli.options import Parser
from newllm_jax.config import NewLLMConfig, load_config
from newllm_jax.errors import InputError
from newllm_jax.files import whole_file

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "results" / "benchmarks"
SCHEMA_VERSION = 1
# Both frameworks share the device, so JAX must not take most of it at its start; peaks count what is in use either way.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}


def has_torch() -> bool:
    """Whether the peers can be measured."""
    return importlib.util.find_spec("torch") is not None


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse names it in its complaint


def names(text: str, known: Sequence[str], option: str) -> list[str]:
    """A list from `a,b`. Raises InputError where a name is not known; `none` is an empty list."""
    chosen = [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise InputError(f"{option}: no {name!r}; there are: {', '.join(known)}")
    return chosen


def configurations(text: str | None, overrides: dict[str, Any]) -> dict[str, NewLLMConfig]:
    """The New-LLM configurations of `a,b` (names or files), by name; `baseline,advanced` where the text is None."""
    chosen = [name.strip() for name in ("baseline,advanced" if text is None else text).split(",") if name.strip()]
    if not chosen:
        raise InputError("config: names no configuration")
    return {name: load_config(name, overrides) for name in chosen}


def integers(text: str, option: str, least: int) -> list[int]:
    """A list from `64,128`. Raises InputError where a part of it is not an integer of at least `least`."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise InputError(f"{option}: {text!r} is not a list of integers of at least {least}")
    return [int(part) for part in parts]


def run_program(main: Callable[[Sequence[str]], None]) -> int:
    """Runs a program on this process's arguments: exit code 0, 2 (bad input, said in a line) or 130 (Ctrl-C)."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 130
    return 0


class Program:
    """One run of a benchmark: its options, its scratch folder and its results so far. A context manager.

    Attributes:
      name: the beginning of the default output file's name; a `part` for `--help` alone says what may follow it.
      file: the default output file, where its name does not depend on the device.
      default_folder: where the default output file lies. In another folder than the benchmarks' own, `part` is the
        beginning of its name in `--help`.
      results: what will be written as JSON.
    """

    def __init__(
        self, name: str, description: str, part: str = "", default_folder: Path = RESULTS, file: Path | None = None
    ) -> None:
        self.name, self.default_folder, self.file = name, default_folder, file
        self.parser = Parser(prog=f"python -m benchmarks.{name}", description=description, allow_abbrev=False)
        beginning = part if part and default_folder != RESULTS else f"{name}-{part}"
        default = (file or default_folder / f"{beginning}DEVICE.json").relative_to(ROOT).as_posix()
        self.parser.add_argument("--output", metavar="FILE", help=f"JSON file to write (default {default})")
        self.arguments: Any = None
        self.results: dict[str, Any] = {}

    def parse(self, argv: Sequence[str]) -> Self:
        """Reads the command line. Raises InputError."""
        self.arguments = self.parser.parse_all(argv)
        return self

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="newllm-benchmarks-")
        self.folder = Path(self._scratch.name)
        if self.arguments.output:  # better refused now than after an hour
            Path(self.arguments.output).absolute().parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._scratch.cleanup()

    def start(self, precision: str = "auto", ceilings: bool = True) -> dict[str, Any]:
        """Describes the machine, measures its ceilings, and begins the results with both. Returns the environment."""
        task = {"precision": precision, "ceilings": ceilings}
        machine = self.measure("benchmarks.harness.machine:measure", task, "this machine")
        if "error" in machine:
            raise InputError(f"JAX does not run here: {machine['error']}")
        found = machine["environment"]
        if found["platform"] == "cpu" and found["load_average"] > found["cores"] / 2:
            print(f"warning: the machine is busy (load {found['load_average']:.1f}); the times will be too long, "
                  "PyTorch's most of all", file=sys.stderr)  # fmt: skip
        command = shlex.join([*self.parser.prog.split(), *sys.argv[1:]])
        self.results = {"schema_version": SCHEMA_VERSION, "benchmark": self.name, "command": command, **machine}
        self.results["peers"] = "measured" if has_torch() else "absent: PyTorch is not installed"
        return found

    def measure(
        self, function: str, task: dict[str, Any], what: str, limit: float | None = None, fatal: bool = False
    ) -> dict[str, Any]:
        """Calls `module:function` with a task in a process of its own.

        Args:
          what: tells the user what is being measured.
          limit: seconds after which the process is ended.
          fatal: whether a failure of this measurement ends the program.

        Returns:
          What the function returned, or `{"error": line}`.

        Raises:
          InputError: the function's, or any failure of a fatal measurement.
        """
        print(f"{what} ...", file=sys.stderr, end=" ", flush=True)
        started = time.monotonic()
        number = len(list(self.folder.glob("*.task")))
        path = self.folder / f"{number}.task"
        path.write_text(json.dumps({**task, "function": function, "folder": str(self.folder)}))
        line, log = _run([sys.executable, "-m", "benchmarks.harness.worker", str(path)], limit)
        written = path.with_suffix(".result")
        result = json.loads(written.read_text()) if written.is_file() else {"error": line}
        if "error" in result:
            print(f"failed: {result['error']}", file=sys.stderr)
            if fatal:
                raise InputError(f"{what} failed: {result['error']}\n{log}")
        elif "input_error" in result:
            print("failed", file=sys.stderr)
            raise InputError(result["input_error"])
        else:
            print(f"{time.monotonic() - started:.1f} s", file=sys.stderr)
        return result

    def output_file(self) -> Path:
        """Where the results are written; known once the program has started."""
        if self.arguments.output:
            return Path(self.arguments.output)
        return self.file or self.default_folder / f"{self.name}-{self.results['environment']['slug']}.json"

    def save(self) -> Path:
        """Writes the results as they are by now."""
        path = self.output_file()
        with whole_file(path) as partial:
            partial.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        return path

    def write(self, tables: str) -> None:
        """Writes the results and prints their tables."""
        print(f"{tables}\n\nwritten to {self.save()}")


def _run(command: list[str], limit: float | None) -> tuple[str, str]:
    """Runs a worker to its end or its limit: the line that says why there is no result, and the end of its output."""
    variables = {**os.environ, **ENVIRONMENT}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as output:
        # Its own process group: a compilation that is given up leaves no compilers behind.
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            code = process.wait(limit)
            line = f"ended with code {code}"
        except subprocess.TimeoutExpired:
            line = f"given up after {limit:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return line, output.read()[-2000:]
