"""Every bad input that `bad_input/` lists: `python -m tests.reliability.inputs [--only TEXT]`.

Commands run in processes of their own, with a time limit and a memory limit; calls run in this one. A bad input passes
where it ends with exit code 2 and exactly one line, `error: ` and what the case expects it to say, without a traceback,
and leaves nothing behind. The counts and every message are written to docs/results/reliability/inputs.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.bad_input import GROUPS, Case
from tests.reliability.tiny import CHECKOUT, NEWLLM, environment, options, settings, write_sources

RESULTS = CHECKOUT / "docs" / "results" / "reliability" / "inputs.json"
SECONDS = 120.0  # of a command, the start of Python and JAX included, on a machine that does other things too
MEMORY = 2 * 2**30  # bytes resident
ADDRESSES = 16 * 2**30  # bytes of address space: a large allocation fails at once
SOURCES = ("corpus.txt", "rows.jsonl", "base")


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
      code: the exit code; None where it had to be killed.
      said: stdout of an accepted input, stderr of a refused one.
      left: what is in the folder that was not there before.
      peak: the most memory in use, in bytes; 0 for a call.
    """

    code: int | None
    said: str
    left: tuple[str, ...] = ()
    seconds: float = 0.0
    peak: int = 0


def faults(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with how a case ended."""
    found = []
    if outcome.code is None:
        found.append("hang")
    elif outcome.code != case.code:
        found.append(f"exit code {outcome.code}")
    if "Traceback" in outcome.said:
        found.append("traceback")
    if case.code and (not outcome.said.startswith("error: ") or outcome.said.count("\n") != 1):
        found.append("not one line")
    if not all(part in outcome.said for part in case.says.split(" ... ")):
        found.append("another message")
    if case.code and len(outcome.said) > 12_000:
        found.append("a message without end")
    if case.code and outcome.left:
        found.append(f"left behind: {', '.join(outcome.left)}")
    if outcome.peak > MEMORY:
        found.append(f"{outcome.peak / 2**30:.1f} GiB")
    return found


def make_material(folder: Path) -> None:
    """The sources, a finished run of each training command, named by it, and two of them exported."""
    write_sources(folder)
    for command, values in settings(Path()).items():
        typed = [command, *options(values), "--run_root=made"]
        subprocess.run([*NEWLLM, *typed], cwd=folder, env=environment(folder), check=True, stdout=subprocess.DEVNULL)
        (made,) = (folder / "made").iterdir()
        made.rename(folder / command)
    (folder / "made").rmdir()
    for run, exported in {"train": "exported", "finetune": "exported_finetune"}.items():
        typed = ["export", run, f"--to={exported}"]
        subprocess.run([*NEWLLM, *typed], cwd=folder, env=environment(folder), check=True, stdout=subprocess.DEVNULL)


def copy_material(case: Case, material: Path, folder: Path) -> None:
    """What a case needs, in a folder of its own."""
    for name in SOURCES:
        (shutil.copytree if (material / name).is_dir() else shutil.copy)(material / name, folder / name)
    if case.run:
        shutil.copytree(material / case.run, folder / "run")
    case.prepare(folder)


def listing(folder: Path) -> set[str]:
    """All paths in a folder, but the locks of runs."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".lock"}


def try_command(case: Case, material: Path, folder: Path) -> Outcome:
    """Runs a command in a process with limits."""
    copy_material(case, material, folder)
    before, started = listing(folder), time.monotonic()
    with (folder.parent / f"{folder.name}.out").open("w+b") as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [*NEWLLM, *(word.encode("utf-8", "surrogateescape") for word in case.typed)], cwd=folder,
            env={**environment(material), **case.environment}, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        resource.prlimit(process.pid, resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        in_time = timer.is_alive()
        timer.cancel()
        process.returncode = code = os.waitstatus_to_exitcode(status)
        (stream := err if case.code else out).seek(0)
        said = stream.read().decode("utf-8", "replace")
    left = tuple(sorted(listing(folder) - before))
    return Outcome(code if in_time else None, said, left, time.monotonic() - started, usage.ru_maxrss * 1024)


def namespace(run: Path) -> dict[str, Any]:
    """What the expressions of calls know: the public names and some objects."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import newllm_jax
    from newllm_jax.cascade.extraction import Tokens
    from newllm_jax.smollm.llama_config import LlamaConfig
    from tests.reliability.tiny import SMALL

    llama = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
    )
    return {
        **{name: getattr(newllm_jax, name) for name in newllm_jax.__all__},
        "np": np, "jnp": jnp, "Path": Path, "llama": llama,
        "run": newllm_jax.restore(run),
        "words": newllm_jax.WordTokenizer(("<PAD>", "<UNK>", "<BOS>", "<EOS>", "a")),
        "tokens": Tokens(np.ones((4, 16), np.float32), *(np.ones(4, kind) for kind in (np.int32, "f", "f", bool))),
        "small": newllm_jax.NewLLMConfig(dataset="corpus.txt", **SMALL),
        "apply": lambda model, *arguments: model.init(jax.random.key(0), *arguments),
    }  # fmt: skip


def try_call(case: Case, names: dict[str, Any], folder: Path) -> Outcome:
    """Evaluates an expression in this process, whose current folder is `folder`."""
    from newllm_jax.errors import InputError

    before, started, code = listing(folder), time.monotonic(), 0
    with alarm(SECONDS):
        try:
            said = repr(eval(case.call, names))
        except InputError as error:
            code, said = 2, f"error: {error}\n"
        except TimeoutError:
            code, said = None, "no end"
        except Exception as error:
            code, said = 1, f"Traceback: {type(error).__name__}: {error}"
    return Outcome(code, said, tuple(sorted(listing(folder) - before - {"runs"})), time.monotonic() - started)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds; in the main thread only."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_all(groups: dict[str, list[Case]], root: Path, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Tries the cases; tells of each that fails."""
    material = root / "material"
    material.mkdir()
    make_material(material)
    tried: list[dict[str, Any]] = []

    def judge(group: str, case: Case, outcome: Outcome) -> None:
        said = outcome.said.replace(str(material), "MATERIAL").replace(str(root), "FOLDER").strip()
        found = faults(case, outcome)
        if found:
            tell(f"{group}: {case.name}\n  expected {case.says!r}\n  {'; '.join(found)}\n  {said[-1500:]}")
        shown = said if len(said) < 300 else f"{said[:200]} ... {said[-80:]}"
        tried.append({"group": group, "case": case.name, "exit_code": outcome.code, "faults": found,
                      "said": shown if case.code else "(accepted)", "seconds": round(outcome.seconds, 2),
                      "peak_memory_bytes": outcome.peak})  # fmt: skip

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = []
        for group, cases in groups.items():
            for case in cases:
                if case.typed or not case.call:
                    (folder := root / f"{len(futures)}").mkdir()
                    futures.append((group, case, pool.submit(try_command, case, material, folder)))
        for group, case, future in futures:
            judge(group, case, future.result())
    os.environ.update(environment(material))
    with contextlib.chdir(material):
        names = namespace(material / "train")
        for group, cases in groups.items():
            for case in cases:
                if case.call:
                    judge(group, case, try_call(case, names, material))
    return tried


def main() -> int:
    """Tries them all; returns 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases with this text in their name; writes no results")
    only = parser.parse_args().only
    groups = {group: [case for case in cases if only in case.name] for group, cases in GROUPS.items()}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tried = try_all(groups, Path(folder).resolve(), lambda text: print(text, flush=True))
    failed = [each for each in tried if each["faults"]]
    counts = {
        "tried": len(tried),
        "by_group": {group: sum(each["group"] == group for each in tried) for group in groups},
        "refused": sum(each["exit_code"] == 2 for each in tried),
        "accepted": sum(each["exit_code"] == 0 for each in tried),
        "failed": len(failed),
        **{fault: sum(any(fault in found for found in each["faults"]) for each in tried)
           for fault in ("traceback", "hang", "not one line", "another message", "left behind", "GiB")},
        "slowest_seconds": max(each["seconds"] for each in tried),
        "largest_peak_memory_bytes": max(each["peak_memory_bytes"] for each in tried),
    }  # fmt: skip
    print(json.dumps(counts, indent=2))
    if not only:
        from newllm_jax.records.machine import environment as machine

        results = {"command": "python -m tests.reliability.inputs", "environment": machine("fp32"), **counts,
                   "seconds": round(time.monotonic() - started), "cases": tried}  # fmt: skip
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
