"""A search over the settings of a peer of New-LLM: `python -m benchmarks.peers` (`--help` tells the rest).

Trains LSTMs or GPTs in PyTorch on the data of our recipes, setting by setting. The best one by its validation
perplexity is trained again, for longer and from several seeds; only those runs see the test split.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.program import Program, has_torch, integers, positive, run_program
from benchmarks.subjects.peer_config import KINDS, PeerConfig
from benchmarks.subjects.peer_settings import EPOCHS, SIZES, read_settings, task_config
from benchmarks.tables.files import RESULTS
from benchmarks.tables.peers import peer_table, trial_table
from newllm_jax.errors import InputError, NumericalError
from newllm_jax.files import read_json
from newllm_jax.newllm.wikitext import load_wikitext

FOLDER = RESULTS / "peers"
Train = Callable[[PeerConfig, bool], dict[str, Any]]  # whether the test split is measured -> a row of the results


def options() -> Program:
    """The program with its options; nothing is parsed or trained yet."""
    program = Program("peers", "Search the settings of a PyTorch peer of New-LLM.", "TASK-KIND-SIZE-", FOLDER)
    add = program.parser.add_argument
    add("--task", choices=list(EPOCHS), default="words", help="windows of 64 ids and 1,000 words, or WikiText-2 as one "
        "stream with all its words (default words)")  # fmt: skip
    add("--kind", choices=list(KINDS), default="lstm", help="what is trained; gpt for words only (default lstm)")
    add("--size", choices=list(SIZES), default="large", help="shape that the settings start from (default large)")
    add("--settings", metavar="FILE", help="JSON list of the settings to try, objects by name (default: twelve)")
    add("--dataset", help="data set: Hub name, folder, file or builtin (default: New-LLM's)")
    add("--epochs", type=positive, help="epochs of a trial (default: of words 20, of wikitext2 12)")
    add("--final_epochs", type=positive, help="epochs of a final run (default 40)")
    add("--seeds", default="0,1,2", help="seeds of the final runs (default 0,1,2)")
    add("--limit", type=positive, metavar="SECONDS", help="start no training after so many seconds; --resume goes on")
    add("--resume", action="store_true", help="keep the trainings that the output file already has")
    return program


def main(argv: Sequence[str]) -> None:
    """Searches as the command line asks for, writes and prints what was found."""
    started = time.monotonic()
    program = options().parse(argv)
    typed = program.arguments
    configs = read_settings(typed.settings, typed.task, typed.kind, typed.size)
    if typed.epochs:
        configs = [config.override({"epochs": typed.epochs}) for config in configs]
    seeds = integers(typed.seeds, "seeds", 0)
    if not has_torch():
        raise InputError("peers: PyTorch is not installed; pip install -e '.[benchmarks]'")
    task = task_config(typed.task, typed.dataset, configs[0].batch_size)
    data = load_wikitext(task)
    with program:
        program.start(ceilings=False)
        program.name = f"{typed.task}-{typed.kind}-{typed.size}"
        subject: Any = importlib.import_module("benchmarks.subjects.torch_peers")  # imports PyTorch
        program.results |= {"task": typed.task, "kind": typed.kind, "data": data.summary(task)}

        def train(config: PeerConfig, test: bool) -> dict[str, Any]:
            read = subject.PeerData.of(data, task.override({"batch_size": config.batch_size}))
            return subject.train_peer(config, read, test)

        deadline = started + typed.limit if typed.limit else None
        search = Search(program, train, earlier_rows(program) if typed.resume else [], deadline)
        search.run(configs, seeds, typed.final_epochs or EPOCHS[typed.task][1])
        program.write(f"{peer_table([program.results])}\n\n{trial_table(program.results)}")


class Search:
    """The trials of a search and its final runs, one after another; the file is written after each.

    Args:
      train: what trains a peer.
      earlier: rows of an earlier run of the same search, which are not made again.
      deadline: on the monotonic clock, when no training starts any more; None: there is none.
    """

    def __init__(self, program: Program, train: Train, earlier: list[dict[str, Any]], deadline: float | None) -> None:
        self.program, self.train, self.earlier, self.deadline = program, train, earlier, deadline

    def run(self, configs: list[PeerConfig], seeds: list[int], final_epochs: int) -> None:
        """Tries all settings, then trains the best one from every seed; a limit leaves some out, and says so."""
        results = self.program.results
        results |= {"trials": [], "final": [], "left_out": []}
        self.rows("trials", configs, test=False)
        trained = [row for row in results["trials"] if "error" not in row]
        if results["left_out"] or not trained:  # the best one is not known
            results["left_out"] += [f"final, seed {seed}" for seed in seeds]
            self.program.save()
            return
        best = PeerConfig(**min(trained, key=lambda row: row["best"]["val_loss"])["settings"])
        self.rows("final", [best.override({"epochs": final_epochs, "seed": seed}) for seed in seeds], test=True)

    def rows(self, part: str, configs: list[PeerConfig], test: bool) -> None:
        """The rows of a part of the results, `trials` or `final`."""
        results = self.program.results
        for number, config in enumerate(configs, 1):
            name = f"final, seed {config.seed}" if test else f"setting {number}"
            row = self.row(config, test, name)
            if row is None:
                results["left_out"].append(name)
            else:
                results[part].append(row)
            self.program.save()

    def row(self, config: PeerConfig, test: bool, name: str) -> dict[str, Any] | None:
        """A row: an earlier one of these settings, a new one, or what went wrong; None where the time is over."""
        for row in self.earlier:
            if row["settings"] == config.to_dict() and ("test" in row) == test and "error" not in row:
                return row
        if self.deadline and time.monotonic() > self.deadline:
            return None
        print(f"{name} ...", file=sys.stderr, end=" ", flush=True)
        try:
            row = self.train(config, test)
            print(f"{row['best']['val_ppl']:.2f}, {row['seconds']:.1f} s", file=sys.stderr)
        except (NumericalError, RuntimeError) as error:  # out of memory is a RuntimeError of PyTorch
            row = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:300]}
            print(f"failed: {row['error']}", file=sys.stderr)
        return {"settings": config.to_dict(), **row}


def earlier_rows(program: Program) -> list[dict[str, Any]]:
    """The trainings in the output file. Raises InputError where it is absent or of another search."""
    path = program.output_file()
    found = read_json(Path(path))
    mine = program.results
    for key in ("benchmark", "task", "kind", "data"):
        if not isinstance(found, dict) or found.get(key) != mine[key]:
            raise InputError(f"resume: {path} is of another search (its {key} differs)")
    return [*found["trials"], *found["final"]]


if __name__ == "__main__":
    sys.exit(run_program(main))
