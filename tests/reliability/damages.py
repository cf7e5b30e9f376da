"""Random damages of what runs read: `python -m tests.reliability.damages`.

Each trial damages a copy of a run or a cache, restores the model, and goes on with the training. What comes of it must
be what comes of the undamaged copy, or one line that refuses it. A restored model may be an earlier one where that is
told.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.reliability.random_edits import damage
from tests.reliability.tiny import CHECKOUT, environment, settings, write_sources

OUTPUT = CHECKOUT / "docs" / "results" / "reliability" / "damages.json"
# Kind -> the command that trains the run, what is changed of its settings, and how it goes on.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "train": ("train", {}, {"num_epochs": 4}),
    "cascade": ("cascade", {}, {}),
    "cascade-stopped": ("cascade", {}, {}),
    "finetune": ("finetune", {}, {"num_epochs": 4}),
}
SHARES = {"train": 0.4, "cascade": 0.15, "cascade-stopped": 0.15, "finetune": 0.15, "prepared": 0.15}  # of the trials
TIMES = {"seconds", "tokens_per_second", "command", "name", "run_id", "sha256", "peak_memory_bytes", "environment"}


@dataclass(frozen=True)
class Trial:
    """One damage and what came of it.

    Attributes:
      number: which one; it decides all that is random.
      kind: of what: one of `KINDS`, or `prepared` for the cache of prepared data.
      damage: what was done to which file.
      restored, resumed: `same`, `told` (an earlier model, and a note), `refused` (a line), `silent` (another model or
        another result without a word) or `crash` (a traceback); "" where it was not tried.
      said: the line that refused it, or the traceback.
    """

    number: int
    kind: str
    damage: str
    restored: str
    resumed: str
    said: str

    @property
    def is_fault(self) -> bool:
        """Whether it shows a fault of the library."""
        return bool({"silent", "crash"} & {self.restored, self.resumed})


# What is compared


def timeless(content: Any) -> Any:
    """Results without what differs between two equal runs."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in TIMES}
    return [timeless(item) for item in content] if isinstance(content, list | tuple) else content


def model_of(run: Path) -> Any:
    """The numbers of a restored model."""
    import jax
    import numpy as np

    from newllm_jax import systems

    found = systems.restore(run)
    if found.config.system == "cascade":
        trees = [(stage.params, stage.threshold) for stage in found.stages]  # type: ignore[union-attr]
    else:
        trees = [getattr(found, "params", None) or found.base.params]  # type: ignore[union-attr]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]


def same(left: Any, right: Any) -> bool:
    """Whether two models or results are equal to the bit."""
    import numpy as np

    if isinstance(left, list) and left and isinstance(left[0], np.ndarray):
        return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
    return left == right


def attempt(action: Callable[[], Any], truth: Any) -> tuple[str, str]:
    """Tries what a user would; returns the outcome, as `Trial` has it, and what was said."""
    from newllm_jax.errors import InputError, Note

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = action()
        except InputError as error:
            return ("refused", str(error)) if "\n" not in str(error) else ("crash", str(error))
        except Exception:
            return "crash", traceback.format_exc()
    notes = [str(each.message) for each in caught if issubclass(each.category, Note)]
    if same(found, truth):
        return "same", "; ".join(notes)
    return ("told", "; ".join(notes)) if notes else ("silent", "")


def _system(command: str) -> Any:
    from newllm_jax.systems import SYSTEMS

    return next(system for system in SYSTEMS.values() if system.command == command)


def make_sources(folder: Path) -> None:
    """Trains the runs that are damaged, and the same with another seed; `cascade-stopped` has not reached its end."""
    write_sources(folder)
    for kind, (command, changes, _) in KINDS.items():
        for name, seed in ((kind, 0), (f"{kind}-foreign", 1)):
            _train(folder, command, name, {**changes, "seed": seed})


def _train(folder: Path, command: str, name: str, changes: dict[str, Any]) -> None:
    from newllm_jax.errors import Stopped
    from newllm_jax.systems import call

    system = _system(command)
    config = system.config.from_dict({**settings(folder)[command], "checkpoint_every": 1, **changes})

    def stop() -> bool:
        return "stopped" in name and any((folder / "runs").glob("*/checkpoints/stage_2/epoch_1"))

    with contextlib.suppress(Stopped):
        call(system.train, config, name=name, run_root=folder / "runs", narrate=_quiet, stop=stop)
    (made,) = (folder / "runs").iterdir()
    made.rename(folder / name)


def go_on(command: str, run: Path, overrides: dict[str, Any]) -> Any:
    """The results of a run that is continued to its end."""
    from newllm_jax.systems import call

    results = call(_system(command).train, resume=run, overrides=overrides, narrate=_quiet).results
    return timeless({key: results.get(key) for key in ("epochs", "best", "test", "stages", "ensemble")})


def prepared(folder: Path) -> Any:
    """The prepared data of New-LLM, from the cache where it is whole."""
    from newllm_jax.config import NewLLMConfig
    from newllm_jax.newllm.wikitext import load_wikitext

    data = load_wikitext(NewLLMConfig.from_dict(settings(folder)["train"]))
    counts = [data.texts, data.words, list(data.tokenizer.words)]
    return [*data.sequences.values(), json.dumps(counts)]


def _quiet(_: str) -> None:
    pass


def _silence() -> None:
    """The lines of an epoch are of no use here."""
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (as long as the process lives)


@functools.cache
def truth(folder: Path, kind: str) -> tuple[Any, Any]:
    """What is restored from, and what becomes of, the undamaged run."""
    command, _, overrides = KINDS[kind]
    with tempfile.TemporaryDirectory() as home:
        copy = Path(shutil.copytree(folder / kind, Path(home) / "run"))
        restored, _ = _restored(copy)
        return restored, go_on(command, copy, overrides)


def _restored(run: Path) -> tuple[Any, str]:
    """The model of a run, or, of one that has none yet, the line that says so."""
    from newllm_jax.errors import InputError

    try:
        return model_of(run), ""
    except InputError as error:
        return None, str(error)


def try_damage(number: int, folder: Path) -> Trial:
    """Trial `number`, on the runs and caches in `folder`."""
    draw = random.Random(number)
    kind = draw.choices([*KINDS, "prepared"], [*SHARES.values()])[0]
    with tempfile.TemporaryDirectory() as home:
        if kind == "prepared":
            return _try_prepared(number, folder, Path(home), draw)
        command, _, overrides = KINDS[kind]
        copy = Path(shutil.copytree(folder / kind, Path(home) / "run"))
        done = damage(copy, folder / f"{kind}-foreign", draw)
        model, results = truth(folder, kind)
        restored, said = ("", "") if model is None else attempt(lambda: model_of(copy), model)
        resumed, also_said = attempt(lambda: go_on(command, copy, overrides), results)
        return Trial(number, kind, done, restored, resumed, f"{said} | {also_said}".replace(home, ""))


def _try_prepared(number: int, folder: Path, home: Path, draw: random.Random) -> Trial:
    os.environ["NEWLLM_CACHE"] = str(home)
    whole = prepared(folder)
    (home / "foreign" / "newllm").mkdir(parents=True)
    done = damage(home / "newllm", home / "foreign" / "newllm", draw)
    found, said = attempt(lambda: prepared(folder), whole)
    again, _ = attempt(lambda: prepared(folder), whole)
    return Trial(number, "prepared", done, found, again, said.replace(str(home), ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the trials and writes their counts. Returns 1 where a trial shows a fault, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    started, numbers = time.monotonic(), range(arguments.first, arguments.first + arguments.trials)
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        os.environ |= environment(folder)
        workers = ProcessPoolExecutor(arguments.processes, get_context("spawn"), _silence)
        with workers:
            workers.submit(make_sources, folder).result()
            trials = []
            for trial in workers.map(functools.partial(try_damage, folder=folder), numbers, chunksize=4):
                trials.append(trial)
                if trial.is_fault:
                    print(json.dumps(asdict(trial)), flush=True)
                if len(trials) % 50 == 0:
                    print(f"{len(trials)} trials in {time.monotonic() - started:.0f} s", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(counts(trials, time.monotonic() - started), indent=2) + "\n")
    return int(any(trial.is_fault for trial in trials))


def counts(trials: Sequence[Trial], seconds: float) -> dict[str, Any]:
    """What `docs/reliability.md` tells of the trials."""
    table = {
        kind: {
            what: dict(Counter(getattr(trial, what) for trial in trials if trial.kind == kind and getattr(trial, what)))
            for what in ("restored", "resumed")
        }
        for kind in SHARES
    }
    return {
        "command": "python -m tests.reliability.damages",
        "trials": len(trials),
        "first": min(trial.number for trial in trials),
        "silent": sum("silent" in (trial.restored, trial.resumed) for trial in trials),
        "tracebacks": sum("crash" in (trial.restored, trial.resumed) for trial in trials),
        "outcomes": table,
        "faults": [asdict(trial) for trial in trials if trial.is_fault],
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
