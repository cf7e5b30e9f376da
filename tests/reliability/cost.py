"""What the manifest of a checkpoint costs: `python -m tests.reliability.cost`.

Epochs of `advanced`, as many updates as on WikiText-2, from one checkpoint to the next: with and without the hashes of
what is saved, in turn. And the time to check the hashes of a checkpoint when it is read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np

from newllm_jax.config import load_config
from newllm_jax.newllm.updates import build_training, initial_state, training_model, training_precision
from newllm_jax.records.machine import environment
from newllm_jax.training import manifest
from newllm_jax.training.checkpoint import Checkpoints, every_few_epochs, state_trees
from newllm_jax.training.clock import Clock
from newllm_jax.training.loop import fit
from newllm_jax.training.manifest import Owner, check_arrays
from newllm_jax.training.split import Split
from newllm_jax.training.stopping import Stopping
from tests.reliability.tiny import CHECKOUT

OUTPUT = CHECKOUT / "docs" / "results" / "reliability" / "cost.json"
SEQUENCES, VALIDATION = 51_026, 5_286  # of WikiText-2, about


def seconds_of_epochs(folder: Path, setup: Any, epochs: int, hashed: bool) -> list[float]:
    """From each epoch's end to that of the next, checkpoint and validation included; without the first, which compiles.

    Args:
      hashed: False leaves the hashes of the arrays out.
    """
    config, training, state, splits = setup
    config, ends = config.override({"num_epochs": epochs + 2, "patience": epochs + 2}), list[float]()
    observer = SimpleNamespace(progress=lambda *_: None, epoch=lambda _: ends.append(time.monotonic()))
    unhashed = mock.patch.object(manifest, "array_sha256", lambda _: "")
    with nullcontext() if hashed else unhashed, Checkpoints(folder, Owner("cost"), every_few_epochs(5)) as checkpoints:
        fit(training, jax.tree.map(jax.numpy.copy, state), splits, config, checkpoints, observer,
            Stopping(Clock(), folder, config))  # fmt: skip
    return [end - start for start, end in pairwise(ends[1:])]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    config = load_config("advanced")
    precision, draw = training_precision(config), np.random.default_rng(0)
    model = training_model(config, config.vocabulary_size, precision)
    counts = {"train": arguments.sequences, "validation": arguments.sequences * VALIDATION // SEQUENCES + 1}
    splits = {
        name: Split.from_arrays(draw.integers(4, config.vocabulary_size, (count, config.sequence_length), np.uint16))
        for name, count in counts.items()
    }
    training, optimizer = build_training(config, model, splits["train"].steps(config.batch_size))
    state = initial_state(config, model, optimizer)
    taken: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as home:
        for number in range(arguments.rounds):
            for hashed in (True, False):
                folder = Path(home) / f"{number}-{hashed}"
                taken[hashed] += seconds_of_epochs(folder, (config, training, state, splits), arguments.epochs, hashed)
    written = manifest.manifest(Owner("cost"), 1, state_trees(state), {})
    checks = []
    for _ in range(7):
        fresh = jax.block_until_ready(jax.tree.map(lambda leaf: leaf + 0, state_trees(state)))
        started = time.perf_counter()
        check_arrays({**written, "arrays": manifest.manifest(Owner(), 1, fresh, {})["arrays"]}, {})
        checks.append(time.perf_counter() - started)
    with_hashes, without = statistics.median(taken[True]), statistics.median(taken[False])
    results = {
        "command": "python -m tests.reliability.cost",
        "environment": environment(precision),
        "state_megabytes": round(sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6, 1),
        "sequences": arguments.sequences,
        "epoch_seconds_with_hashes": with_hashes,
        "epoch_seconds_without": without,
        "share_of_an_epoch": with_hashes / without - 1,
        "hashing_seconds": statistics.median(checks),
        "epochs_each": len(taken[True]),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
