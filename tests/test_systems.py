"""The table of the systems: every cell is there, and a run finds its row."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
import re

import pytest

from newllm_jax import systems
from newllm_jax.cli.commands import COMMANDS
from newllm_jax.config import NewLLMConfig, config_names, load_config
from newllm_jax.errors import InputError
from newllm_jax.newllm import plan as newllm_plan
from newllm_jax.systems import SYSTEMS, largest_micro_batch, system_of
from newllm_jax.training.memory import DoesNotFit

FUNCTIONS = "precision", "warning", "train", "plan", "restore", "evaluate", "show", "generate", "report"


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_cell_of_a_row_is_there(name):
    row = SYSTEMS[name]
    assert row.config.system == name
    assert row.command in COMMANDS
    assert row.default in config_names(row.config.configurations)
    assert isinstance(load_config(row.default, config_class=row.config), row.config)
    for cell in FUNCTIONS:
        function = getattr(row, cell)
        assert function is None or callable(pkgutil.resolve_name(function)), cell


def test_a_run_finds_its_row(copy):
    assert system_of(copy) is SYSTEMS["new-llm"]
    for name in ("another", ["new-llm"]):
        (copy / "config.json").write_text(json.dumps({"system": name}))
        with pytest.raises(InputError, match="names no system that is known"):
            system_of(copy)


def planned(monkeypatch, usable: int | None) -> None:
    """Plans need 10 bytes for every example that is computed at a time; so much may be used."""

    def plan(config):
        return {"estimated_memory_bytes": 10 * config.examples_at_once, "config": config.to_dict()}

    monkeypatch.setattr(newllm_plan, "plan_newllm", plan)
    monkeypatch.setattr(systems, "usable_memory", lambda: usable)


@pytest.mark.parametrize("usable, expected", [(1000, None), (999, 50), (499, 25), (130, 13), (129, 7), (10, 1)])
def test_the_largest_micro_batch_is_the_first_half_that_fits(monkeypatch, usable, expected):
    planned(monkeypatch, usable)
    config, told = largest_micro_batch(NewLLMConfig(batch_size=100))
    assert config == NewLLMConfig(batch_size=100, micro_batch=expected)
    assert told.startswith(f"{expected or 100} of 100 examples at a time, in ")


@pytest.mark.parametrize(
    "usable, message", [(9, "not even one example at a time fits"), (None, "does not tell how much")]
)
def test_where_nothing_fits_or_is_known(monkeypatch, usable, message):
    planned(monkeypatch, usable)
    with pytest.raises(InputError, match=f"auto_batch: .*{message}"):
        largest_micro_batch(NewLLMConfig())


def test_what_a_smaller_batch_does_not_change_is_named(monkeypatch):
    planned(monkeypatch, 100)

    def refuse(config):
        raise DoesNotFit("memory: the run needs at least 9 GiB; lower train_chunks")

    monkeypatch.setattr(newllm_plan, "plan_newllm", refuse)
    with pytest.raises(InputError, match="lower train_chunks"):
        largest_micro_batch(NewLLMConfig())


def test_what_to_do_for_less_memory_names_settings():
    for row in SYSTEMS.values():
        words = re.findall(r"\w+_\w+", row.less_memory)
        settings = {field.name for field in dataclasses.fields(row.config)} | {"auto_batch"}
        assert "micro_batch" in words and set(words) <= settings
