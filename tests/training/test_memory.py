"""Runs that do not fit the machine: refused by shapes alone where they suffice, else by XLA's plan."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm import plan
from newllm_jax.newllm.tokenizer import SPECIAL_WORDS, WordTokenizer
from newllm_jax.newllm.updates import initial_state, training_model
from newllm_jax.newllm.wikitext import Wikitext
from newllm_jax.training import memory
from newllm_jax.training.memory import check_memory, device_memory, host_memory
from newllm_jax.training.optimizer import adamw

GIB = 2**30


@pytest.fixture
def free(monkeypatch):
    """Sets what the machine has free, in bytes; no run is too small to be refused."""
    monkeypatch.setattr(memory, "SMALL", 0)

    def set_free(size):
        monkeypatch.setattr(memory, "host_memory", lambda: ("this machine", size))

    return set_free


def test_what_the_machine_has():
    where, free = host_memory()
    assert where == "this machine" and 10**8 < free < 10**14
    assert device_memory()[0] == "this machine"  # a CPU


def test_small_runs_are_not_refused(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: ("this machine", 0))
    check_memory({"batch_size": memory.SMALL})
    with pytest.raises(InputError, match="lower batch_size"):
        check_memory({"batch_size": memory.SMALL + 1})


def test_a_limit_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {GIB}\nfile {GIB}\n")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert host_memory()[1] == 2 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory()[1] > 2 * GIB


def test_the_plan_is_asked_where_it_could_matter(free):
    asked = []

    def planned(size):
        return lambda: asked.append(size) or size

    free(100 * GIB)
    check_memory({"a": 10 * GIB}, planned(10**15))
    check_memory({"a": 90 * GIB}, planned(99 * GIB))
    assert asked == [99 * GIB]
    said = "memory: the run needs at least 101.00 GiB, this machine has 100.00 GiB free; lower a (80.00 GiB of it)"
    with pytest.raises(InputError) as raised:
        check_memory({"a": 80 * GIB, "b": 5 * GIB}, planned(101 * GIB))
    assert str(raised.value) == said
    with pytest.raises(InputError, match=r"needs at least 180.00 GiB.* lower b \(170.00 GiB of it\)"):
        check_memory({"a": 10 * GIB, "b": 170 * GIB}, planned(10**15))
    assert asked == [99 * GIB, 101 * GIB]
    free(None)
    check_memory({"a": 10**30}, planned(10**30))


def data(config, sequences=100):
    rows = np.zeros((sequences, config.sequence_length), np.uint16)
    words = (*SPECIAL_WORDS, *(f"w{number}" for number in range(config.vocabulary_size - 4)))
    splits = ("train", "validation", "test")
    counts = dict.fromkeys(splits, sequences)
    return Wikitext(WordTokenizer(words), dict.fromkeys(splits, rows), counts, counts, {})


SMALL = NewLLMConfig(embed_dim=8, hidden_dim=32, context_dim=16, num_layers=2, vocabulary_size=300, batch_size=64)


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True, "cell": "residual", "ema_decay": 0.9}], ids=str)
def test_the_bound_is_below_the_plan_and_near_it(options):
    config = SMALL.override(options)
    rows = data(config)
    bound = sum(plan.memory_bound(config, config.vocabulary_size, "fp32").values())
    bound += sum(each.nbytes for each in rows.sequences.values())
    assert bound < plan.planned_memory(config, rows, "fp32") < memory.PLAN_FACTOR * bound
    model = training_model(config, config.vocabulary_size, "fp32")
    state = jax.eval_shape(lambda: initial_state(config, model, adamw(1e-3, 0)))
    assert plan.parameter_count(config, 300) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))


LARGE = {"vocabulary_size": 65536, "hidden_dim": 65536, "embed_dim": 65536, "context_dim": 65536, "num_layers": 256}


def test_a_run_that_does_not_fit_is_refused(refused, options, in_an_empty_folder, tmp_path, free):
    free(16 * GIB)
    large = [f"--{name}={size}" for name, size in LARGE.items()]
    assert "lower hidden_dim, context_dim, embed_dim or num_layers (" in refused(*options, *large, "--dry_run")
    for typed in (["--batch_size=1048576", "--hidden_dim=256"], ["--sequence_length=10000", "--batch_size=100000"]):
        assert "lower micro_batch, batch_size or sequence_length (" in refused(*options, *typed)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_by_the_plan_alone(refused, options, in_an_empty_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "planned_memory", lambda *_: 10**15)
    monkeypatch.setattr(memory, "PLAN_FACTOR", 10**9)
    assert "memory: the run needs at least 931,322.57 GiB" in refused(*options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [
    {"num_epochs": 30_000}, {"decay_epochs": 30_000}, {"clip_norms": (1, 2), "clip_epochs": (30_000,)},
])  # fmt: skip
def test_more_updates_than_can_be_counted(settings, monkeypatch):
    assert plan.LAST_UPDATE == 2**31 - 1
    monkeypatch.setattr(plan, "LAST_UPDATE", 30_000_000)
    config = NewLLMConfig(**{"num_epochs": 1, "clip_norms": (1,), "clip_epochs": (), "batch_size": 1, **settings})
    plan.check_fits(config, data(config, 1000), "fp32")
    name = list(settings)[-1]
    with pytest.raises(InputError, match=f"{name}: 30,000 epochs of 1,001 updates are more than 30,000,000"):
        plan.check_fits(config, data(config, 1001), "fp32")


@pytest.mark.parametrize(("free_bytes", "name", "value"), [
    (10**6, "batch_size", 2**20), (10**6, "stage_layers", 1000), (10**4, "train_chunks", 37),
])  # fmt: skip
def test_a_cascade_that_does_not_fit(refused, tiny, free, in_an_empty_folder, tmp_path, free_bytes, name, value):
    free(free_bytes)
    settings = tiny.to_dict() | {"examples": "device", name: value}
    typed = [f"--{name}={value}" for name, value in settings.items() if value not in ("", [])]
    for dry_run in ([], ["--dry_run"]):
        line = refused("cascade", *typed, *dry_run)
        assert line.startswith("memory: ") and f" {name} " in line.partition("; lower")[2]
    assert list(tmp_path.iterdir()) == []


def test_a_fine_tuning_that_does_not_fit(refused, tiny, free, in_an_empty_folder, tmp_path):
    names = "base_model", "dataset", "train_chunks", "validation_chunks"
    typed = ["finetune", *(f"--{name}={getattr(tiny, name)}" for name in names)]
    free(10**5)
    assert "lower micro_batch or batch_size (" in refused(*typed, "--batch_size=1048576")
    assert list(tmp_path.iterdir()) == []
