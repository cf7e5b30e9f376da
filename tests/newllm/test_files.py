"""Runs whose examples stay in files, and packed text: the bits of a run on the device, stopped within an epoch too."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import newllm_jax
from newllm_jax.config import load_config
from newllm_jax.errors import InputError, Stopped
from newllm_jax.newllm.experiment import train_newllm
from newllm_jax.newllm.plan import plan_newllm
from newllm_jax.newllm.run import evaluate_run
from newllm_jax.newllm.sweep import sweep_newllm
from newllm_jax.newllm.tokenizer import EOS, PAD, UNK
from newllm_jax.newllm.wikitext import SPLITS, load_wikitext, prepare
from newllm_jax.training import feed as feeds

FILES = {"examples": "files", "save_minutes": 1000}
TIMINGS = {"tokens_per_second", "seconds"}


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Three updates in a block, of eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeds, "BLOCK_BYTES", 3 * 32 * 16 * 2)
        yield


@pytest.fixture(scope="module")
def config(small):
    return load_config("baseline", small | {"text": "packed", "learning_rate": 1e-2})


@pytest.fixture(scope="module")
def on_device(config, tmp_path_factory):
    return train(config.override({"examples": "device"}), tmp_path_factory.mktemp("device"))


def train(config, root, **options):
    return train_newllm(config, run_root=root, narrate=lambda _: None, **options)


def same(left, right) -> bool:
    """Whether two runs have the same history, test loss and best parameters, bit for bit."""
    histories = [
        [{name: value for name, value in entry.items() if name not in TIMINGS} for entry in run.results["epochs"]]
        for run in (left, right)
    ]
    params = [jax.tree.leaves(newllm_jax.restore(run.run_dir).params) for run in (left, right)]
    return (
        histories[0] == histories[1]
        and left.results["test"] == right.results["test"]
        and all(np.array_equal(one, other) for one, other in zip(*params, strict=True))
    )


def test_a_run_in_files_has_the_bits_of_one_on_the_device(config, on_device, tmp_path):
    in_files = train(config.override(FILES), tmp_path)
    assert same(in_files, on_device)
    assert in_files.results["data"] == on_device.results["data"]
    assert in_files.results["data"]["steps_per_epoch"] > 6  # more than two blocks
    assert evaluate_run(in_files.run_dir) == evaluate_run(on_device.run_dir)
    assert not same(train(config.override({**FILES, "seed": 1}), tmp_path / "another"), on_device)


@pytest.mark.parametrize("asked", [2, 7])
def test_a_stop_within_an_epoch_changes_nothing_nor_does_another_place_of_the_examples(
    config, on_device, tmp_path, asked
):
    times = iter(range(10**6))
    with pytest.raises(Stopped):
        train(config.override(FILES), tmp_path, stop=lambda: next(times) >= asked)
    (run_dir,) = tmp_path.iterdir()
    assert list((run_dir / "checkpoints" / "within_epoch").glob("epoch_*"))
    overrides = {"examples": "device"} if asked == 7 else {}
    resumed = train_newllm(resume=run_dir, overrides=overrides, narrate=lambda _: None)
    assert same(resumed, on_device)


def test_a_run_resumed_after_an_epoch_has_the_same_bits(config, on_device, tmp_path):
    half = train(config.override({**FILES, "num_epochs": 1}), tmp_path)
    assert same(train_newllm(resume=half.run_dir, overrides={"num_epochs": 2}, narrate=lambda _: None), on_device)


def test_packed_text_is_the_stream_in_windows_that_overlap_by_one_id(config):
    texts = {"train": ["a b a", "", "b <unk> c a b"], "validation": ["a"], "test": ["c", "c zebra"]}
    config = config.override({"sequence_length": 4})
    data = prepare(texts, config, {"source": "here", "fallback": ""})
    words = data.tokenizer.words
    for split in SPLITS:
        stream = [EOS]
        for text in texts[split]:
            stream += [words.index(word) if word in words[4:] else UNK for word in text.split()] + [EOS]
        windows = [stream[first : first + 4] for first in range(0, len(stream) - 1, 3)]
        expected = [window + [PAD] * (4 - len(window)) for window in windows]
        assert data.sequences[split].tolist() == expected
        assert data.targets(split, config) == len(stream) - 1
    assert data.sequences["train"].shape == (4, 4)


def test_packed_text_predicts_what_a_stream_does(config):
    packed, stream = load_wikitext(config), load_wikitext(config.override({"text": "stream"}))
    for split in SPLITS:
        targets = packed.sequences[split][:, 1:].ravel()
        assert np.array_equal(targets[targets != PAD], stream.sequences[split][1:])
    assert packed.summary(config)["test_targets"] == len(stream.sequences["test"]) - 1


def test_a_plan_counts_blocks(config):
    assert plan_newllm(config.override(FILES))["estimated_memory_bytes"] > 0
    data = load_wikitext(config)
    assert data.held("train", config.override(FILES)).size == 2 * feeds.BLOCK_BYTES
    assert data.held("train", config).size == data.sequences["train"].nbytes > 2 * feeds.BLOCK_BYTES


def test_what_does_not_go_with_files(config, tmp_path):
    with pytest.raises(InputError, match="^examples: must be auto or device where text is a stream"):
        config.override({"text": "stream", "examples": "files"})
    with pytest.raises(InputError, match="^examples: must be auto or device in a fine-tuning"):
        newllm_jax.load_config("lora", {"examples": "files"}, config_class=newllm_jax.config.FinetuneConfig)
    with pytest.raises(InputError, match="^examples: must be left as it is by default in a sweep"):
        sweep_newllm(config.override({"examples": "files"}), {"seed": [0, 1]}, run_root=tmp_path)


TRAIN_ONCE = """
import json, sys, threading
from pathlib import Path

import jax
from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.experiment import Setup
from newllm_jax.newllm.updates import initial_state
from newllm_jax.training import feed
from newllm_jax.training.loop import Pieces, run_epoch
from newllm_jax.training.place import Place

feed.BLOCK_BYTES = 2**23
peak, ended = 0, threading.Event()

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while not ended.wait(0.005):
        peak = max(peak, anonymous())

def train(dataset):
    config = NewLLMConfig.from_dict({**json.loads(sys.argv[1]), "dataset": dataset})
    setup = Setup.from_config(config)
    split = setup.data.split("train", config)
    place = Place.start(1, initial_state(config, setup.model, setup.optimizer))
    with feed.open_feed(split, config.batch_size, 0, 1) as batches:
        next(run_epoch(setup.training.updates, place, batches, jax.random.key(1), Pieces(setup.data.steps(config))))
    return sum(ids.nbytes for ids in setup.data.sequences.values())

train(sys.argv[2])
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
size = train(sys.argv[3])
ended.set()
print(json.dumps({"bytes": size, "growth": peak - before}))
"""
GROWTH = 150 * 2**20  # bytes that a run may grow by beside one of a small source, most of them for compiling once more


def write_parquet(path, texts: int) -> int:
    """A source of texts of 1,000 words of 100 letters; the bytes of its text."""
    words = ["".join(map(chr, np.random.default_rng(index).integers(97, 123, 100))) for index in range(500)]
    random = np.random.default_rng(0)
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="zstd") as writer:
        for _ in range(0, texts, 100):
            rows = [" ".join(words[index] for index in row) for row in random.integers(0, 500, (100, 1000))]
            writer.write_table(pa.table({"text": rows}))
    return texts * 1000 * 101


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_source(small, tmp_path):
    settings = small | {
        "text": "windows", "sequence_length": 64, "stride": 1, "examples": "files", "vocabulary_size": None,
        "num_layers": 1, "dropout": 0.0,
    }  # fmt: skip
    files, text = [tmp_path / "small.parquet", tmp_path / "large.parquet"], 0
    for file, texts in zip(files, (200, 2000), strict=True):
        text = write_parquet(file, texts)
    command = [sys.executable, "-c", TRAIN_ONCE, json.dumps(settings), *map(str, files)]
    environment = os.environ | {"NEWLLM_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert min(found["bytes"], text) > 1.2 * GROWTH
    assert found["growth"] < GROWTH, found
