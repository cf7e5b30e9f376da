"""A CASCADE whose hidden states are several times what its memory grows by, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.subjects.bounded import base_of_width, write_rows
from tests.reliability.tiny import CHECKOUT, environment, write_base

WIDTH, ROWS = 1024, 600
LEAST = 4  # times as large as the growth are the hidden states

# A small run first: what is compiled and allocated once is no part of the growth. The blocks of a test are small.
RUN = """
import json, sys
from pathlib import Path
from benchmarks.subjects.bounded import Watch, anonymous_bytes
from newllm_jax.cascade import extraction
from newllm_jax.cascade.experiment import train_cascade
from newllm_jax.config import CascadeConfig
from newllm_jax.training import feed

feed.BLOCK_BYTES = 2**22
extraction.PIECE_BATCHES = 1
config, runs = CascadeConfig.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2])
train_cascade(config.override({"train_chunks": 40}), run_root=runs, narrate=str)
before, watch = anonymous_bytes(), Watch(runs)
with watch.watching():
    data = train_cascade(config, run_root=runs, narrate=str).results["data"]
print(json.dumps({"tokens": data["train_tokens"] + data["val_tokens"], "disk": watch.disk,
                  "growth": watch.anonymous - before}))
"""


def test_hidden_states_take_no_memory(tmp_path):
    write_base(tmp_path / "base", vars(base_of_width(WIDTH)))
    write_rows(tmp_path / "rows.jsonl", ROWS)
    config = {
        "base_model": str(tmp_path / "base"), "dataset": str(tmp_path / "rows.jsonl"), "train_chunks": None,
        "validation_chunks": 8, "num_stages": 2, "stage_layers": 1, "num_epochs": 1, "batch_size": 256,
        "examples": "files",
    }  # fmt: skip
    command = [sys.executable, "-c", RUN, json.dumps(config), str(tmp_path / "runs")]
    ran = subprocess.run(
        command, cwd=CHECKOUT, env=environment(tmp_path), capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    print(found)
    assert found["disk"] > 1.8 * found["tokens"] * WIDTH * 4  # of the base, of hard tokens, what a stage makes of them
    assert found["disk"] > LEAST * found["growth"], found
    assert list((tmp_path / "runs").glob("*/extraction")) == []
