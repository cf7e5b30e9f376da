"""The table of the systems: every cell is there, and a run finds its row."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
import re

import pytest

from newllm_jax.cli.commands import COMMANDS
from newllm_jax.config import config_names, load_config
from newllm_jax.errors import InputError
from newllm_jax.systems import SYSTEMS, system_of

FUNCTIONS = (
    "precision", "warning", "train", "plan", "restore", "evaluate", "show", "in_precision", "generate", "generate_all",
    "report", "export", "frontier", "next_steps",
)  # fmt: skip


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


def test_what_to_do_for_less_memory_names_settings():
    for row in SYSTEMS.values():
        words = re.findall(r"\w+_\w+", row.less_memory)
        settings = {field.name for field in dataclasses.fields(row.config)} | {"auto_batch"}
        assert "micro_batch" in words and set(words) <= settings
