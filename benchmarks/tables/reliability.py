"""The tables of docs/reliability.md: what was tried, how often, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from benchmarks.tables.files import load
from newllm_jax.report.tables import markdown_table

OUTCOMES = {  # of `python -m tests.reliability.damages`
    "same": "as if undamaged",
    "told": "an earlier epoch, told",
    "refused": "refused in a line",
    "silent": "silently wrong",
    "crash": "traceback",
}


def counts() -> str:
    """One line for each kind of trial."""
    kills, signals, damages, inputs, fuzz = map(_load, ("kills", "signals", "damages", "inputs", "fuzz"))
    readers = fuzz["readers"].values()
    rows = [
        ["`kills`", f"{kills['kills']} SIGKILLs of {kills['trials']} runs, resumed to the end",
         f"{kills['bit_equal']} of {kills['trials']} runs equal to the bit"],
        ["`signals`", f"{signals['trials']} signals, {_started(signals)} of them before the run had begun",
         f"{len(signals['faults'])} faults; at most {signals['longest_seconds_to_the_end']:.1f} s to the end"],
        ["`damages`", f"{damages['trials']:,} random damages of runs and caches",
         f"{damages['silent']} silently wrong, {damages['tracebacks']} tracebacks"],
        ["`inputs`", f"{inputs['tried']} bad inputs", f"{inputs['traceback']} tracebacks, {inputs['hang']} hangs"],
        ["`fuzz`", f"{sum(reader['inputs'] for reader in readers):,} inputs of the GGUF, safetensors and JSON readers",
         f"{sum(reader['failed'] for reader in readers)} faults"],
    ]  # fmt: skip
    return markdown_table(["`python -m tests.reliability.`", "tried", "found"], rows)


def memory() -> str:
    """How the memory of long commands grows."""
    rows = [
        [name, f"{each['count']:,}", f"{each['growth_by_epoch']['resident_bytes'] / 1024:.1f} KiB",
         str(each["arrays_by_epoch"]), f"{each['last']['resident_bytes'] / 2**20:.0f} MiB"]
        for name, each in _load("memory")["processes"].items()
    ]  # fmt: skip
    return markdown_table(
        ["process", "epochs, texts or saves", "growth by each", "arrays saved by each", "memory at the end"], rows
    )


def damages() -> str:
    """What came of damages, by what was damaged."""
    found = _load("damages")["outcomes"]
    rows = [
        [kind, {"restored": "model restored", "resumed": "training continued"}[what],
         *(str(outcomes[what].get(outcome, 0)) for outcome in OUTCOMES)]
        for kind, outcomes in found.items() for what in ("restored", "resumed")
    ]  # fmt: skip
    return markdown_table(["damaged", "then", *OUTCOMES.values()], rows)


def kills() -> str:
    """How many kills hit what."""
    found = _load("kills")
    return "\n\n".join(
        markdown_table([head, "kills"], [[name, str(count)] for name, count in found[key].items()])
        for head, key in (("kind of run", "kills_by_kind"), ("moment", "kills_by_phase"))
    )


def inputs() -> str:
    """Bad inputs by group."""
    found = _load("inputs")
    rows = [[group, str(count)] for group, count in found["by_group"].items()]
    return markdown_table(["kind of input", "cases"], rows)


def cases() -> str:
    """Every bad input and what is said of it."""
    rows = [
        [each["group"], _cell(each["case"]), _cell(each["said"]).removeprefix("error: ")]
        for each in _load("inputs")["cases"]
    ]
    return markdown_table(["kind", "input", "answer"], rows)


def cost() -> str:
    """What a manifest costs."""
    found = _load("cost")
    rows = [
        ["state of `advanced`", f"{found['state_megabytes']} MB"],
        ["an epoch with hashes", f"{found['epoch_seconds_with_hashes']:.3f} s"],
        ["without", f"{found['epoch_seconds_without']:.3f} s"],
        ["difference", f"{found['share_of_an_epoch']:.1%} of an epoch"],
        ["hashing alone", f"{1000 * found['hashing_seconds']:.0f} ms"],
    ]
    return markdown_table([found["environment"]["device"], f"medians of {found['epochs_each']} epochs each"], rows)


def determinism() -> str:
    """What did not give the same bits in another process, and on one core."""
    found = _load("determinism")
    differ = set(found["not_the_same_on_one_core"])

    def row(kind: str, tried: Collection[str]) -> list[Any]:
        again = len(set(found["not_the_same"]["default"]) & set(tried))
        return [kind, len(tried), again, len(differ & set(tried)), ", ".join(f"`{x}`" for x in tried if x in differ)]

    rows = [row(kind, found["modes"]["default"][kind]) for kind in ("commands", "operations")]
    columns = [found["environment"]["device"], "tried", "differ in another process", "differ on one core", "which"]
    return markdown_table(columns, rows)


def _load(name: str) -> Any:
    return load(f"reliability/{name}.json")


def _started(signals: dict[str, Any]) -> int:
    return sum(count for moment, count in signals["by_moment"].items() if moment in ("python", "start"))


def _cell(text: str) -> str:
    """A text in one line of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")[:160]


RELIABILITY_TABLES: dict[str, Callable[[], str]] = {
    "reliability counts": counts,
    "reliability memory": memory,
    "reliability damages": damages,
    "reliability kills": kills,
    "reliability inputs": inputs,
    "reliability cases": cases,
    "reliability cost": cost,
    "reliability determinism": determinism,
}
