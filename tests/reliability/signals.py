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
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.reliability.tiny import CHECKOUT, NEWLLM, environment, options, python, settings, write_sources

CODES = {"SIGINT": 130, "SIGTERM": 143}
WORDS = {"SIGINT": "stopped", "SIGTERM": "terminated"}
LATEST = 3.0  # seconds after its start that a command gets its signal
LATEST_IN_A_RUN = 4.0  # seconds after a run has begun
SECONDS_TO_END = 5.0
LIMIT = 30  # seconds, of the runs with a time limit
FOREVER = {"num_epochs": 30000, "patience": 30000, "checkpoint_every": 30000}
OUTPUT = CHECKOUT / "docs" / "results" / "reliability" / "signals.json"


@dataclass(frozen=True)
class Trial:
    """A command, its signal, and what came of it.

    Attributes:
      after: seconds to the signal, from its start, or from the start of its run.
      moment: what it was doing: `python` (before the first line of ours), `start`, `run` (the run has a directory),
        `end` (it was over).
      times: how many signals were sent.
      fault: what was wrong; "" where nothing was.
      seconds: from the signal to the end.
    """

    command: str
    signal: str
    after: float
    moment: str
    times: int
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


def trainings(folder: Path) -> dict[str, list[str]]:
    """How trainings are started that get their signals while they train."""
    values = settings(folder)
    within = {"save_minutes": 1e-9, "mirror": "drive"}
    return {
        "train.py": python(CHECKOUT / "train.py", *options({**values["train"], **FOREVER})),
        "train.py, within epochs": python(CHECKOUT / "train.py", *options({**values["train"], **FOREVER, **within})),
        "cascade.py": python(CHECKOUT / "cascade.py", *options({**values["cascade"], **within})),
        "newllm finetune": [*NEWLLM, "finetune", *options({**values["finetune"], **FOREVER})],
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


@dataclass(frozen=True)
class Plan:
    """What a trial does: sends a command a signal, `after` its start, or after that of its run."""

    command: str
    typed: list[str]
    signal: str
    after: float
    in_a_run: bool = False
    times: int = 1


def run_trial(plan: Plan, folder: Path) -> Trial:
    """Starts a command in an empty folder, sends it a signal, and resumes the run that it began.

    Args:
      folder: with the sources and the caches.
    """
    with tempfile.TemporaryDirectory(dir=folder) as home:
        runs, out = Path(home) / "runs", (Path(home) / "out").open("w")
        with out, subprocess.Popen(
            plan.typed, cwd=home, env=environment(folder), stdout=out, stderr=subprocess.PIPE, text=True
        ) as process:  # fmt: skip
            while plan.in_a_run and process.poll() is None and not list(runs.glob("*/config.json")):
                time.sleep(0.01)
            time.sleep(plan.after)
            moment, started = moment_of(process, runs), time.monotonic()
            for _ in range(plan.times):
                process.send_signal(getattr(signal, plan.signal))
                time.sleep(0.05 if plan.times > 1 else 0)
            try:
                _, err = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                err = "it did not end"
            seconds = time.monotonic() - started
        if moment != "python" and process.returncode == 0:  # it was over, or within its last steps
            moment = "end"
        fault = ""
        if moment == "end":
            fault = err
        elif moment != "python":
            fault = fault_of(process.returncode, err, seconds, plan.signal) or resumption(plan.typed, home, folder)
    return Trial(plan.command, plan.signal, plan.after, moment, plan.times, fault, seconds)


def fault_of(code: int, err: str, seconds: float, sent: str) -> str:
    """What is wrong with the end of a command; "" where nothing is."""
    if code != CODES[sent]:
        return f"exit code {code}: {err}"
    if not re.fullmatch(f"error: {WORDS[sent]}(; [^\n]*--resume [^\n]+)?\n", err):
        return f"it said {err!r}"
    return f"it took {seconds:.1f} s" if seconds > SECONDS_TO_END + 1 else ""


def resumption(typed: Sequence[str], home: str, folder: Path) -> str:
    """What is wrong with resuming the run that a command began; "" where it began none or nothing is."""
    runs = Path(home) / "runs"
    begun = [file.parent for file in runs.glob("*/config.json")]
    if not begun:
        left = [path.name for path in runs.glob("*")]
        return f"it left {left}" if left else ""
    again = [*(word for word in typed if not word.startswith("--")), "--resume", str(begun[0])]
    if "--num_epochs=30000" in typed:
        metrics = begun[0] / "metrics.jsonl"
        done = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        again += ["--num_epochs", str(done + 1)]
    done = subprocess.run(again, cwd=home, env=environment(folder), capture_output=True, text=True)
    left = [
        file for file in ("results.json", "report.md", "report.html", "curves.png") if not (begun[0] / file).is_file()
    ]
    return f"resuming: {done.stderr}" if done.returncode else f"resumed without {left}" if left else ""


def run_limited(folder: Path) -> dict[str, Any]:
    """A run that would never end, but for its time limit, which counts from about the first line that it writes."""
    typed = [*trainings(folder)["train.py"], f"--time_limit={LIMIT}s"]
    with tempfile.TemporaryDirectory(dir=folder) as home, subprocess.Popen(
        typed, cwd=home, env=environment(folder), stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines, started = [process.stdout.readline()], time.monotonic()
        lines += process.stdout
        code, seconds = process.wait(), time.monotonic() - started
        is_told = lines[-1].startswith(f"stopped     before the time limit of {LIMIT}s; --resume ")
        is_right = code == 0 and is_told and seconds < LIMIT
        fault = resumption(typed, home, folder) if is_right else f"exit code {code}, {seconds:.1f} s: {lines[-1]}"
    return {"limit": LIMIT, "seconds": round(seconds, 1), "fault": fault}


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
    parser.add_argument("--processes", type=int, default=2, help="commands at a time")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup would have the commands ignore it
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        typed, trained = commands(folder, prepare(folder)), trainings(folder)
        plans = []
        for number in range(arguments.trials):
            name, sent = list(typed)[number % len(typed)], list(CODES)[number // len(typed) % 2]
            plans.append(Plan(name, typed[name], sent, draw.uniform(0, LATEST)))
        for number in range(arguments.trials // 2):
            name, sent = list(trained)[number % len(trained)], list(CODES)[number // len(trained) % 2]
            after, times = draw.uniform(0, LATEST_IN_A_RUN), 1 + (number % 3 == 2)
            plans.append(Plan(name, trained[name], sent, after, True, times))

        def attempt(plan: Plan) -> Trial:
            trial = run_trial(plan, folder)
            print(json.dumps(asdict(trial)), flush=True)
            return trial

        with ThreadPoolExecutor(arguments.processes) as threads:
            trials = list(threads.map(attempt, plans))
            limited = list(threads.map(lambda _: run_limited(folder), range(4)))
    counts = {
        "command": "python -m tests.reliability.signals",
        "trials": len(trials),
        "by_moment": dict(Counter(trial.moment for trial in trials)),
        "by_command": dict(Counter(trial.command for trial in trials)),
        "twice": sum(trial.times > 1 for trial in trials),
        "longest_seconds_to_the_end": round(max(trial.seconds for trial in trials), 2),
        "faults": [asdict(trial) for trial in trials if trial.fault],
        "time_limits": limited,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
