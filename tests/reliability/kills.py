"""SIGKILL at any moment of a run: `python -m tests.reliability.kills`.

Each trial starts a tiny run, kills it once or more, at a random time or when a certain file appears, and resumes it to
the end. Results, metrics, parameters and the names of all files must be those of the same run that was never stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.reliability.tiny import CHECKOUT, NEWLLM, environment, options, python, settings, write_sources

OUTPUT = CHECKOUT / "docs" / "results" / "reliability" / "kills.json"
VARYING = {  # of runs of the same settings
    "seconds", "tokens_per_second", "command", "name", "run_id", "sha256", "peak_memory_bytes", "environment",
}  # fmt: skip

WITHIN = {"save_minutes": 1e-9}  # after every piece
MIRRORED = {"mirror": "drive"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # the command that trains, and what is changed of its tiny settings
    "train": ("train", {}),
    "train, within epochs": ("train", {**WITHIN, "batch_size": 8}),
    "train, mirrored": ("train", {**WITHIN, **MIRRORED}),
    "cascade": ("cascade", {}),
    "cascade, within epochs, mirrored": ("cascade", {**WITHIN, **MIRRORED, "batch_size": 32}),
    "finetune": ("finetune", {}),
    "finetune, within epochs, mirrored": ("finetune", {**WITHIN, **MIRRORED, "batch_size": 2}),
}
ANY_TIME = "any time"
PHASES = {  # files whose appearance tells what a run is doing, as patterns in its directory
    "beginning": "checkpoints",
    "settings": "config.json",
    "first checkpoint": "checkpoints/**/*.orbax-checkpoint-tmp*",
    "second epoch": "checkpoints/**/epoch_1",
    "third epoch": "checkpoints/**/epoch_2",
    "pruning": "checkpoints/**/.deleted-*",
    "last epoch": "checkpoints/**/epoch_3",
    "results": ".results.json.*",
    "curves": ".curves.png.*",
    "report": ".report.html.*",
    "end": "report.md",
}
OF_KINDS = {
    "cascade": {
        "extraction": "extraction/.train-*",
        "extracted": "extraction/validation-*",
        "second stage": "checkpoints/stage_2",
        "ensemble": "checkpoints/stage_2/epoch_3",
    },
    "within": {
        "within an epoch": "checkpoints/**/within_epoch/*",
        "written within": "checkpoints/**/within_epoch/*tmp*",
    },
    "mirrored": {
        "mirrored": "../../drive/*/.mirror/*",
        "mirrored checkpoint": "../../drive/*/.mirror/epoch_*",
        "pruned mirror": "../../drive/*/.mirror/deleted-*",
    },
}


# A mirror that looks for news all the time, not every ten seconds: the runs are that short.
MIRRORING = "import newllm_jax.records.mirror as m; m.SECONDS = 0.02; from newllm_jax.__main__ import run; run()"


@dataclass(frozen=True)
class Trial:
    """A run that was killed and resumed.

    Attributes:
      phases: what was waited for before each kill; where the run was over before, there was none.
      fetched: whether its directory was lost after the last kill, and came back from the mirror.
      fault: what was wrong in the end; "" where nothing was.
    """

    number: int
    kind: str
    phases: list[str]
    fetched: bool
    fault: str


def phases_of(kind: str) -> dict[str, str]:
    """The phases of a kind of run, with their patterns; "" for a random time."""
    added = [phases for name, phases in OF_KINDS.items() if name in kind]
    return {ANY_TIME: "", **PHASES, **{name: pattern for phases in added for name, pattern in phases.items()}}


def start(kind: str) -> list[str]:
    """The words that a command of a kind begins with."""
    return [*(python("-c", MIRRORING) if "mirrored" in kind else NEWLLM), KINDS[kind][0]]


def command(kind: str, folder: Path) -> list[str]:
    """What starts a run of a kind, whose sources are in `folder`."""
    name, changed = KINDS[kind]
    return [*start(kind), *options({**settings(folder)[name], **changed})]


def resume(kind: str, run: Path) -> list[str]:
    """What continues a run of a kind. A mirror is asked for each time."""
    mirror = ["--mirror", MIRRORED["mirror"]] if "mirrored" in kind else []
    return [*start(kind), "--resume", str(run), *mirror]


def only_run(home: Path) -> Path | None:
    """The run directory, if a run has begun."""
    found = [file.parent for file in (home / "runs").glob("*/config.json")]
    return found[0] if found else None


def kill(typed: Sequence[str], home: Path, caches: Path | None, pattern: str, after: float) -> bool:
    """Starts a command and kills it; returns whether it was still running.

    Args:
      home: where it runs.
      caches: the folder of its caches; None for those of this process.
      pattern: of the file that is waited for; "" for none.
      after: how long after that it is killed, in seconds.
    """
    with (home / "out").open("w") as out, subprocess.Popen(
        typed, cwd=home, env=environment(caches) if caches else None, stdout=out, stderr=out
    ) as process:  # fmt: skip
        while pattern and process.poll() is None and not _is_there(home / "runs", f"*/{pattern}"):
            time.sleep(0.002)
        time.sleep(after)
        was_running = process.poll() is None
        process.kill()
    return was_running


def _is_there(folder: Path, pattern: str) -> bool:
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:  # a folder that vanished meanwhile
        return False


def run_trial(number: int, seed: int, folder: Path, whole: Mapping[str, Whole]) -> Trial:
    """One trial, all of which follows from its number and the seed, but for the moments of the system.

    Args:
      whole: a run of each kind that was never stopped.
    """
    draw = random.Random(f"{seed} {number}")
    kind = list(KINDS)[number % len(KINDS)]
    patterns = phases_of(kind)
    wanted = [list(patterns)[number // len(KINDS) % len(patterns)]]
    wanted += draw.choices(list(patterns), k=draw.choice([0, 0, 0, 1, 2]))
    killed, typed, fetched = list[str](), command(kind, folder), False
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        home = Path(scratch)
        for phase in wanted:
            after = draw.uniform(0, 0.03) if patterns[phase] else draw.uniform(0, whole[kind].seconds)
            killed += [phase] if kill(typed, home, folder, patterns[phase], after) else []
            run = only_run(home)
            if run is not None:
                typed = resume(kind, run.relative_to(home))
        run = only_run(home)
        if run is not None and (home / "drive" / run.name / "config.json").is_file() and draw.random() < 0.5:
            shutil.rmtree(run)
            fetched = True
        done = subprocess.run(typed, cwd=home, env=environment(folder), capture_output=True, text=True)
        run = only_run(home)
        if done.returncode or run is None:
            fault = f"exit code {done.returncode}: {done.stderr}"
        else:
            fault = difference(outcome(run), whole[kind].outcome)
            if "mirrored" in kind and not fault:
                fault = difference(outcome(home / "drive" / run.name), whole[kind].outcome)
                fault = fault and f"mirror: {fault}"
    return Trial(number, kind, killed, fetched, fault)


def outcome(run: Path) -> dict[str, Any]:
    """All of a finished run that does not vary: results, metrics, parameters, names of files."""
    import jax
    import numpy as np

    import newllm_jax
    from newllm_jax.content import array_sha256

    restored: Any = newllm_jax.restore(run)
    params = getattr(restored, "params", None) or [stage.params for stage in getattr(restored, "stages", ())]
    params = params or restored.base.params
    lines = (run / "metrics.jsonl").read_text().splitlines()
    files = (path.relative_to(run) for path in run.rglob("*") if path.name != ".lock")
    return {
        "results": constant(json.loads((run / "results.json").read_text())),
        "metrics": [constant(json.loads(line)) for line in lines],
        "parameters": [array_sha256(np.asarray(leaf)) for leaf in jax.tree.leaves(params)],
        # Orbax chooses the names of the files in which it writes arrays.
        "files": sorted(path.as_posix() for path in files if "ocdbt.process_0" not in path.parts and path.name != "d"
                        and path.parent.name != "d"),
    }  # fmt: skip


def constant(content: Any) -> Any:
    """Without what varies."""
    if isinstance(content, dict):
        return {name: constant(value) for name, value in content.items() if name not in VARYING}
    return [constant(item) for item in content] if isinstance(content, list) else content


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """In what two outcomes differ; "" where in nothing."""
    if found["files"] != expected["files"]:
        return f"files: {sorted(set(found['files']) ^ set(expected['files']))}"
    return next((f"other {name}" for name in expected if found[name] != expected[name]), "")


@dataclass(frozen=True)
class Whole:
    """A run that was never stopped: what came of it, and the seconds it took."""

    outcome: dict[str, Any]
    seconds: float


def prepare(folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Whole]:
    """Writes sources, and runs each kind twice without a stop.

    Raises:
      RuntimeError: the two differ.
    """
    write_sources(folder)
    whole = {}
    for kind in kinds:
        found = []
        for attempt in range(2):  # the first compiles
            home = folder / f"{kind} {attempt}"
            home.mkdir()
            started = time.monotonic()
            subprocess.run(command(kind, folder), cwd=home, env=environment(folder), check=True, capture_output=True)
            (run,) = (home / "runs").iterdir()
            found.append(Whole(outcome(run), time.monotonic() - started))
        if fault := difference(found[0].outcome, found[1].outcome):
            raise RuntimeError(f"{kind}: two runs without a stop differ ({fault})")
        whole[kind] = found[1]
    return whole


def count(trials: Sequence[Trial]) -> dict[str, Any]:
    """The counts of a file of results."""
    kinds, phases = Counter[str](), Counter[str]()
    for trial in trials:
        kinds[trial.kind] += len(trial.phases)
        phases.update(trial.phases)
    return {
        "command": "python -m tests.reliability.kills",
        "trials": len(trials),
        "kills": kinds.total(),
        "kills_by_kind": dict(kinds),
        "kills_by_phase": dict(phases),
        "fetched_from_the_mirror": sum(trial.fetched for trial in trials),
        "bit_equal": sum(not trial.fault for trial in trials),
        "faults": [asdict(trial) for trial in trials if trial.fault],
    }


def main() -> None:
    """Runs the trials and writes their counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=80, help="a run each, with 103 kills in all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="commands at a time")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        whole = prepare(folder)

        def attempt(number: int) -> Trial:
            trial = run_trial(number, arguments.seed, folder, whole)
            print(json.dumps(asdict(trial)), flush=True)
            return trial

        with ThreadPoolExecutor(arguments.processes) as threads:
            counts = count(list(threads.map(attempt, range(arguments.trials))))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
