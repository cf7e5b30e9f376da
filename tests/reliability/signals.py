"""SIGINT and SIGTERM at any moment of any command: `python -m tests.reliability.signals`.

Each trial starts a command, sends it a signal after a while, and looks at the exit code, at what it wrote, at how long
it took to end, and at whether a run that had begun can be resumed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.reliability.tiny import CHECKOUT, NEWLLM, environment, options, python, settings, write_sources

CODES = {"SIGINT": 130, "SIGTERM": 143}
WORDS = {"SIGINT": "stopped", "SIGTERM": "terminated"}
LATEST = 3.0  # seconds after its start that a command gets its signal
SECONDS_TO_END = 5.0
OUTPUT = CHECKOUT / "docs" / "results" / "reliability" / "signals.json"


@dataclass(frozen=True)
class Trial:
    """A command, its signal, and what came of it.

    Attributes:
      after: seconds from its start to the signal.
      moment: what it was doing: `python` (before the first line of ours), `start`, `run` (the run has a directory),
        `end` (it was over).
      fault: what was wrong; "" where nothing was.
      seconds: from the signal to the end.
    """

    command: str
    signal: str
    after: float
    moment: str
    fault: str
    seconds: float


def commands(folder: Path, run: Path) -> dict[str, list[str]]:
    """How each command is started.

    Args:
      folder: with the sources.
      run: a finished run.
    """
    typed = {name: options(values) for name, values in settings(folder).items()}
    entry = "from newllm_jax.__main__ import run; run()"
    return {
        "train.py": python(CHECKOUT / "train.py", *typed["train"]),
        "cascade.py": python(CHECKOUT / "cascade.py", *typed["cascade"]),
        "newllm finetune": python("-c", entry, "finetune", *typed["finetune"]),  # what the console script does
        "python -m newllm_jax train": [*NEWLLM, "train", *typed["train"]],
        "newllm generate": [*NEWLLM, "generate", str(run), "--max_words", "100000", "--unknown"],
        "newllm evaluate": [*NEWLLM, "evaluate", str(run)],
        "newllm report": [*NEWLLM, "report", str(run)],
        "newllm compare": [*NEWLLM, "compare", str(run)],
        "newllm doctor": [*NEWLLM, "doctor"],
        "train.py --dry_run": python(CHECKOUT / "train.py", *typed["train"], "--dry_run"),
    }


def moment_of(process: subprocess.Popen[str], runs: Path) -> str:
    """What a process is doing, from its mask of blocked signals and from its run directory."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return "end"
    blocked = re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
    if blocked is None or not int(blocked[1], 16) >> (signal.SIGTERM - 1) & 1:
        return "end" if process.poll() is not None else "python"
    return "run" if list(runs.glob("*/config.json")) else "start"


def try_signal(name: str, command: Sequence[str], sent: str, after: float, folder: Path, twice: bool = False) -> Trial:
    """Starts a command and sends it a signal.

    Args:
      folder: of the caches; the command runs in an empty folder in it.
      twice: send it a second time at once.
    """
    with tempfile.TemporaryDirectory(dir=folder) as home:
        runs = Path(home) / "runs"
        out = (Path(home) / "out").open("w+")
        with out, subprocess.Popen(
            command, cwd=home, env=environment(folder), stdout=out, stderr=subprocess.PIPE, text=True
        ) as process:  # fmt: skip
            time.sleep(after)
            moment = moment_of(process, runs)
            started = time.monotonic()
            for _ in range(2 if twice else 1):
                process.send_signal(getattr(signal, sent))
            try:
                _, err = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                return Trial(name, sent, after, moment, "it did not end", 60.0)
            seconds = time.monotonic() - started
            if moment == "end" or (process.returncode == 0 and seconds < 1 and not err):
                return Trial(name, sent, after, "end", "" if process.returncode == 0 else err, seconds)
            if moment == "python":
                return Trial(name, sent, after, moment, "", seconds)
            fault = fault_of(process.returncode, err, seconds, sent) or resumption(runs, command, folder, home)
            return Trial(name, sent, after, moment, fault, seconds)


def fault_of(code: int, err: str, seconds: float, sent: str) -> str:
    """What is wrong with the end of a command; "" where nothing is."""
    if code != CODES[sent]:
        return f"exit code {code}: {err}"
    if not re.fullmatch(f"error: {WORDS[sent]}(; --resume [^\n]+)?\n", err):
        return f"it said {err!r}"
    return f"it took {seconds:.1f} s" if seconds > SECONDS_TO_END + 1 else ""


def resumption(runs: Path, command: Sequence[str], folder: Path, home: str) -> str:
    """What is wrong with resuming the run that a command began; "" where it began none or nothing is."""
    begun = [file.parent for file in runs.glob("*/config.json")]
    if not begun:
        left = [path.name for path in runs.glob("*")]
        return f"it left {left}" if left else ""
    start = [word for word in command if not word.startswith("--")]
    done = subprocess.run(
        [*start, "--resume", str(begun[0])], cwd=home, env=environment(folder), capture_output=True, text=True
    )
    left = [file for file in ("results.json", "report.md", "curves.png") if not (begun[0] / file).is_file()]
    return f"resuming: {done.stderr}" if done.returncode else f"resumed without {left}" if left else ""


def prepare(folder: Path) -> Path:
    """Writes sources into a folder, and one finished run, whose directory is returned."""
    write_sources(folder)
    for name, values in settings(folder).items():  # fills the caches too
        command = [*NEWLLM, name, *options(values), "--run_root", str(folder / name)]
        subprocess.run(command, env=environment(folder), cwd=folder, check=True, capture_output=True)
    (run,) = (folder / "train").iterdir()
    return run


def main() -> None:
    """Runs the trials and writes their counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup would have the commands ignore it
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        typed = commands(folder, prepare(folder))
        plans = [
            (list(typed)[number % len(typed)], list(CODES)[number // len(typed) % 2], draw.uniform(0, LATEST))
            for number in range(arguments.trials)
        ]

        def attempt(plan: tuple[str, str, float]) -> Trial:
            name, sent, after = plan
            trial = try_signal(name, typed[name], sent, after, folder)
            print(json.dumps(asdict(trial)), flush=True)
            return trial

        with ThreadPoolExecutor(2) as threads:
            trials = list(threads.map(attempt, plans))
    moments = {moment: sum(trial.moment == moment for trial in trials) for moment in ("python", "start", "run", "end")}
    counts = {
        "command": "python -m tests.reliability.signals",
        "trials": len(trials),
        "moments": moments,
        "faults": [asdict(trial) for trial in trials if trial.fault],
        "longest_seconds": max(trial.seconds for trial in trials),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
