"""Options of the commands: how they are parsed, what several commands share, and what is set before JAX starts."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from newllm_jax import processes
from newllm_jax.config import RunConfig, check, checked_path, load_config, nearest, parse
from newllm_jax.config.base import Group
from newllm_jax.config.parsing import field_types
from newllm_jax.errors import InputError, named
from newllm_jax.records.narration import JsonLines, Narrate
from newllm_jax.systems import System

HELP = ("-h", "--help")
DESCRIBE = ("--help",)  # as the arguments of a command, this very tuple makes it give its parser away
LONGEST_COMPLAINT = 300  # characters; argparse quotes what was typed, whatever its length


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors, and whose unknown options name the nearest known one."""

    def error(self, message: str) -> NoReturn:
        short = message if len(message) <= LONGEST_COMPLAINT else f"{message[:LONGEST_COMPLAINT]}..."
        raise InputError(short)

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses all of argv. Raises InputError; `Described` where argv is DESCRIBE."""
        if argv is DESCRIBE:
            raise Described(self)
        valued = {option for action in self._actions if action.nargs is None for option in action.option_strings}
        known = {option for action in self._actions for option in action.option_strings}
        joined: list[str] = []
        for token in argv:  # argparse itself takes -1e-4, or a prompt that starts with a dash, for an option
            if joined and joined[-1] in valued and token.split("=")[0] not in known:
                joined[-1] += f"={token}"
            else:
                joined.append(token)
        arguments, unknown = self.parse_known_args(joined)
        if unknown:
            name, names = unknown[0].split("=")[0], [option[2:] for option in known if option.startswith("--")]
            raise InputError(f"{named(name)}: no such option{nearest(name.lstrip('-'), names)}" if name.startswith("-")
                             else f"{named(name)}: unexpected argument")  # fmt: skip
        return arguments


class Described(Exception):
    """What `parser_of` asks a command for."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


def parser_of(command: Callable[[Sequence[str]], int | None]) -> Parser:
    """The parser of a command, which makes it and parses with it before it does anything else."""
    try:
        command(DESCRIBE)
    except Described as described:
        return described.parser
    raise AssertionError(f"{command.__name__} has parsed nothing")


def add_settings(parser: Parser, system: System, argv: Sequence[str], names: Sequence[str] = ()) -> None:
    """Adds the settings of a system, in groups.

    Args:
      argv: what was typed; `--help` shows the defaults of the configuration that it names.
      names: of the settings; all where there are none.

    Raises:
      InputError: `--help` beside a configuration that cannot be read.
    """
    defaults = _configuration(argv, system) if {*HELP} & {*argv} else None
    fields, types = _settings(system.config, names), field_types(system.config)
    for title in get_args(Group):
        if own := [field for field in fields if field.metadata["group"] == title]:
            group = parser.add_argument_group(title)
            for field in own:
                help = field.metadata["help"]
                if defaults is not None:
                    help += f" (default {_typed(getattr(defaults, field.name))})".replace("%", "%%")
                # `--profile` alone is `--profile true`.
                switch: dict[str, Any] = {"nargs": "?", "const": "true"} if types[field.name] is bool else {}
                group.add_argument(f"--{field.name}", metavar="VALUE", help=help, **switch)


def _configuration(argv: Sequence[str], system: System) -> RunConfig:
    """The configuration that `--config` names."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=system.default)
    found, _ = parser.parse_known_args([typed for typed in argv if typed not in HELP])
    return load_config(found.config, config_class=system.config)


def _typed(value: Any) -> str:
    """A value of a setting as it is typed."""
    if isinstance(value, tuple):
        return ",".join(map(_typed, value)) or "''"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value) or "''"


def add_log_format(parser: argparse._ActionsContainer) -> None:
    """Adds `--log_format`."""
    parser.add_argument("--log_format", choices=("text", "json"), default="text",
                        help="lines for people, or JSON, an object a line, for programs (default text)")  # fmt: skip


def narrator(arguments: argparse.Namespace) -> Narrate:
    """What tells the lines or events of a command; nothing where this process is not the first of several."""
    if not processes.is_first():
        return _nothing
    return JsonLines() if arguments.log_format == "json" else print


def _nothing(line: str) -> None:
    """Tells nothing."""


def add_deterministic(parser: argparse._ActionsContainer) -> None:
    """Adds `--deterministic`."""
    parser.add_argument("--deterministic", action="store_true", help="the same bits every time on the same device")


def set_up(arguments: argparse.Namespace) -> None:
    """Sets what XLA, which has not started yet, reads when it does."""
    if arguments.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {deterministic_flags()}".strip()


def deterministic_flags() -> str:
    """XLA's flags for results that have the same bits every time. On a CPU they have them without.

    No operation's result depends on the order of threads, and none is chosen by its speed, which differs from process
    to process. XLA before jaxlib 0.10 also had a fast way to add up rows of a gradient in a fixed order that got some
    of them wrong (openxla/xla, 31746 and 34870); there the slow way is used, one row after the other.
    """
    from importlib.metadata import version

    flags = ["--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0"]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 10):
        flags.append("--xla_gpu_enable_scatter_determinism_expander=false")
    return " ".join(flags)


def _settings(config_class: type[RunConfig], names: Sequence[str]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config_class) if not names or field.name in names]


def new_file(name: str, value: str) -> Path:
    """A path for a file. Raises InputError where there is a folder, or something else that is no file."""
    path = checked_path(name, value)
    check(name, value, "a file or a new name", path.is_file() or not path.exists())
    return path


def typed_settings(
    arguments: argparse.Namespace, config_class: type[RunConfig], names: Sequence[str] = ()
) -> dict[str, Any]:  # fmt: skip
    """The settings that were typed, by name. Raises InputError where one is out of range or of another type."""
    texts = {field.name: getattr(arguments, field.name) for field in _settings(config_class, names)}
    # argparse makes an empty list of `--`
    return {name: parse(config_class, name, text or "") for name, text in texts.items() if text is not None}
