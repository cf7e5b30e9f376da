"""Options of the commands: how they are parsed, what several commands share, and what is set before JAX starts."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from newllm_jax.config import RunConfig, check, checked_path, nearest, parse
from newllm_jax.errors import InputError, named
from newllm_jax.systems import System

LONGEST_COMPLAINT = 300  # characters; argparse quotes what was typed, whatever its length


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors, and whose unknown options name the nearest known one."""

    def error(self, message: str) -> NoReturn:
        short = message if len(message) <= LONGEST_COMPLAINT else f"{message[:LONGEST_COMPLAINT]}..."
        raise InputError(short)

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses all of argv. Raises InputError."""
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


def add_settings(parser: Parser, system: System, title: str, names: Sequence[str] = ()) -> None:
    """Adds the settings of a system as a group of options.

    Args:
      names: of the settings; all where there are none.
    """
    fields = parser.add_argument_group(title)
    for field in _settings(system.config, names):
        fields.add_argument(f"--{field.name}", metavar="VALUE", help=field.metadata["help"])


def add_deterministic(parser: Parser) -> None:
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
