"""What each change to the published advanced model is worth, and the members of a search, from files of `newllm sweep`.

The changes are those of docs/results/experiments/*.json, the searches those of docs/results/recipes/*.json.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.tables.files import load_all
from newllm_jax.config import NewLLMConfig
from newllm_jax.config.base import EVERYWHERE
from newllm_jax.report.tables import markdown_table, number

# What is no change to the model or to its training: where data lie, what is written, rounding, chance.
NO_CHANGE = {*EVERYWHERE, "precision", "seed"}
SETTINGS = tuple(field.name for field in dataclasses.fields(NewLLMConfig) if field.name not in NO_CHANGE)
NONE_YET = "Not run yet."

Changes = tuple[tuple[str, Any], ...]  # (name of a setting, its value), in the order of `SETTINGS`


@dataclass(frozen=True)
class Member:
    """A whole run.

    Attributes:
      file: the name of its file, without ending.
      config: all its settings.
      epochs: how many it was trained.
      val_ppl: at its best epoch; None for a run without a finite one.
      test_ppl: of the parameters of that epoch; None where they were not tested.
    """

    file: str
    config: NewLLMConfig
    epochs: int
    val_ppl: float | None
    test_ppl: float | None

    def changes(self, base: NewLLMConfig) -> Changes:
        """The settings in which it differs from a base."""
        pairs = ((name, getattr(self.config, name)) for name in SETTINGS)
        return tuple((name, value) for name, value in pairs if value != getattr(base, name))


def published_runs() -> list[Member]:
    """The committed runs with the published settings of `advanced`."""
    return [
        _member(file, run["config"], len(run["epochs"]), run)
        for file, run in load_all("newllm", "advanced-seed?.json").items()
    ]


def sweep_members(folder: str, pattern: str = "*.json") -> list[Member]:
    """The members of the sweeps of a folder under `docs/results` whose file names match a pattern."""
    return [
        _member(file, sweep["config"] | member["settings"], member.get("epochs", 0), member)
        for file, sweep in load_all(folder, pattern).items()
        for member in sweep["members"]
    ]


def change_table() -> str:
    """What each change to the published settings is worth: a row for each distinct one, over its seeds.

    The first row are the published settings as `train.py` ran them; where sweeps ran them too, these runs are a row of
    their own. The error of a difference of means is sqrt(s1^2 / n1 + s2^2 / n2), from the standard deviations of both.
    """
    published = published_runs()
    groups: dict[Changes, list[Member]] = {}
    for member in sweep_members("experiments"):
        groups.setdefault(member.changes(published[0].config), []).append(member)
    rows = [_change_row("published settings", published, None)]
    for changes in sorted(groups, key=_order):
        name = ", ".join(f"{name}={shown(value)}" for name, value in changes)
        rows.append(_change_row(name or "published settings, in a sweep", groups[changes], published))
    header = ["change", "epochs", "val PPL of each seed", "mean +- standard deviation", "difference +- its error",
              "test PPL, mean"]  # fmt: skip
    return markdown_table(header, rows)


def search_table(pattern: str = "*.json") -> str:
    """The members of some searches by validation perplexity, with the settings that differ among them."""
    members = sorted(sweep_members("recipes", pattern), key=lambda member: _finite_first(member.val_ppl))
    if not members:
        return NONE_YET
    names = [name for name in (*SETTINGS, "seed") if len({getattr(member.config, name) for member in members}) > 1]
    rows = [
        [
            f"[{member.file}](recipes/{member.file}.json)", *(shown(getattr(member.config, name)) for name in names),
            str(member.epochs), number(member.val_ppl), number(member.test_ppl),
        ]
        for member in members
    ]  # fmt: skip
    return markdown_table(["search", *names, "epochs", "val PPL", "test PPL"], rows)


def shown(value: Any) -> str:
    """A setting's value as the command line takes it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _member(file: str, settings: dict[str, Any], epochs: int, found: dict[str, Any]) -> Member:
    best, test = found.get("best") or {}, found.get("test") or {}  # a member that failed has neither
    return Member(file, NewLLMConfig.from_dict(settings), epochs, best.get("val_ppl"), test.get("ppl"))


def _change_row(name: str, members: Sequence[Member], published: Sequence[Member] | None) -> list[str]:
    """`published`: what it is compared with; None for these themselves."""
    members = sorted(members, key=lambda member: member.config.seed)
    epochs, values = [member.epochs for member in members], [member.val_ppl for member in members]
    lengths = str(epochs[0]) if len(set(epochs)) == 1 else f"{min(epochs)} to {max(epochs)}"
    each = " / ".join(map(number, values))
    finite, tests = _present(values), _present(member.test_ppl for member in members)
    test = number(statistics.mean(tests)) if len(tests) == len(members) else "-"
    if len(finite) < len(members):
        return [name, lengths, each, "-", "-", test]
    mean, error = _mean_and_error(finite)
    deviation = "" if error is None else f" +- {error * math.sqrt(len(finite)):.2f}"
    difference = "-" if published is None else _difference(finite, _present(member.val_ppl for member in published))
    return [name, lengths, each, f"{mean:.2f}{deviation}", difference, test]


def _difference(values: Sequence[float], reference: Sequence[float]) -> str:
    """Of the means, with its standard error where both have several values."""
    (mean, error), (base, base_error) = _mean_and_error(values), _mean_and_error(reference)
    if error is None or base_error is None:
        return f"{mean - base:+.2f}"
    return f"{mean - base:+.2f} +- {math.hypot(error, base_error):.2f}"


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _finite_first(value: float | None) -> float:
    return math.inf if value is None else value


def _order(changes: Changes) -> list[Any]:
    """Fewer changes first; then by setting, and numbers by their size."""

    def rank(value: Any) -> tuple[bool, float, str]:
        is_number = isinstance(value, int | float)
        return not is_number, value if is_number else 0, str(value)

    return [len(changes), *((SETTINGS.index(name), rank(value)) for name, value in changes)]


EXPERIMENT_TABLES: dict[str, Callable[[], str]] = {
    "experiments changes": change_table,
    "experiments search": partial(search_table, "*_plus*.json"),
    "wikitext2 search": partial(search_table, "wikitext2*.json"),
}
