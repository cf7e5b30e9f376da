"""Completion in a shell: a script that knows every command, its options, and the values that they can have."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from newllm_jax.cli.options import Parser
from newllm_jax.config.load import config_names
from newllm_jax.config.parsing import field_types
from newllm_jax.systems import SYSTEMS, System

FOLDERS = ("run_dir", "resume", "runs", "run_root", "folder", "mirror")  # options and arguments that name one
FILES = ("output", "dataset")
WITH_SETTINGS = {"sweep": "new-llm", "hardness": "cascade"}  # systems of commands that train none of their own


def completion_script(shell: str, parsers: Mapping[str, Parser]) -> str:
    """The script for a shell, by the library shtab.

    Args:
      shell: `bash`, `zsh` or `fish`.
      parsers: of all commands, by name.
    """
    import shtab

    newllm = argparse.ArgumentParser(prog="newllm")
    commands = newllm.add_subparsers()
    for name, parser in parsers.items():
        _add_values(parser, _system_of(name))
        commands.add_parser(name, parents=[parser], add_help=False, help=parser.description)
    return shtab.complete(newllm, shell=shell)


def _system_of(command: str) -> System | None:
    """The system whose settings are options of a command."""
    named = {system.command: system for system in SYSTEMS.values()}
    return named.get(command) or SYSTEMS.get(WITH_SETTINGS.get(command, ""))


def _add_values(parser: Parser, system: System | None) -> None:
    """Tells shtab what the options and arguments of a command can be."""
    import shtab

    declared: Mapping[str, Any] = field_types(system.config) if system else {}
    for action in parser._actions:
        if action.dest in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif system and action.dest == "config":
            action.choices = config_names(system.config.configurations)
        elif action.choices is None and (values := _values(declared.get(action.dest))):
            action.choices = values


def _values(declared: Any) -> tuple[str, ...]:
    """All values that a setting of a type can have, as they are typed; none where they are too many."""
    if typing.get_origin(declared) is Literal:
        return typing.get_args(declared)
    if typing.get_origin(declared) is types.UnionType:
        return ("none",)
    return ("true", "false") if declared is bool else ()
