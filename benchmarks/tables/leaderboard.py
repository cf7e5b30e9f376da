"""The tables of docs/leaderboard.md: for each benchmark the figures over time, the best so far in bold.

A line names the JSON files that its figures come from, and the commit and day with which they came. A new entry is a
new line of the list of its benchmark.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tables.experiments import shown
from benchmarks.tables.files import load
from benchmarks.tables.frontier import by_model, chosen
from newllm_jax.report.tables import markdown_table, number

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A line of a leaderboard.

    Attributes:
      what: the model or the work.
      files: paths under docs/results: a run a seed, or one file with all of them.
      commit, day: with which the files came.
    """

    what: str
    files: tuple[str, ...]
    commit: str
    day: str

    @property
    def loaded(self) -> Rows:
        return [load(file) for file in self.files]

    def cells(self, *figures: str) -> list[str]:
        """The line: when, what, the figures, then card and command, linked to the file."""
        first = self.loaded[0]
        card = f"{first['environment']['device']}, {first['environment']['precision']}"
        command = first["command"].replace("|", "\\|")
        return [self.day, f"`{self.commit}`", self.what, *figures, card, f"[`{command}`](results/{self.files[0]})"]


def _seeds(name: str) -> tuple[str, ...]:
    return tuple(f"newllm/{name}-seed{seed}.json" for seed in range(3))


WORDS = (
    Entry("`advanced`, published settings", _seeds("advanced-loops"), "c47e4ee", "2026-11-21"),
    Entry("`baseline`, published settings", _seeds("baseline-loops"), "c47e4ee", "2026-11-21"),
    Entry("`baseline`, kernels in bf16", _seeds("baseline"), "94a350b", "2026-11-22"),
    Entry("`baseline_plus`", ("recipes/baseline_plus.json",), "a61890c", "2026-11-26"),
    Entry("`advanced_plus`", ("recipes/advanced_plus.json",), "a61890c", "2026-11-26"),
)
STREAM = (  # searches: of each the member that is best on validation
    Entry("`wikitext2`, light dropout", ("recipes/wikitext2-search.json",), "993239f", "2026-11-27"),
    Entry("`wikitext2`, its own dropout", ("recipes/wikitext2-search-heavier.json",), "993239f", "2026-11-27"),
)
TRAINING = (
    Entry("`advanced`", _seeds("advanced-loops"), "c47e4ee", "2026-11-21"),
    Entry("`advanced`", _seeds("advanced"), "94a350b", "2026-11-22"),
    Entry("`baseline`", _seeds("baseline-loops"), "c47e4ee", "2026-11-21"),
    Entry("`baseline`", _seeds("baseline"), "94a350b", "2026-11-22"),
)
UPDATES = (
    Entry("`advanced`", ("benchmarks/newllm-advanced-h200.json",), "e1372a9", "2026-11-22"),
    Entry("`advanced`", ("benchmarks/newllm-advanced-clusters-h200.json",), "4c7fd4b", "2026-11-28"),
    Entry("`baseline`", ("benchmarks/newllm-baseline-h200.json",), "e1372a9", "2026-11-22"),
    Entry("`baseline`", ("benchmarks/newllm-baseline-h100.json",), "490fb5e", "2026-11-28"),
    Entry("CASCADE stage 1 at 0.6", ("benchmarks/cascade-h200.json",), "e1372a9", "2026-11-22"),
)
GENERATION = (
    Entry("", ("benchmarks/generation-h200.json",), "21d2f4a", "2026-11-26"),
    Entry("", ("benchmarks/generation-transformers-h200.json",), "fe901a7", "2026-11-27"),
    Entry("", ("benchmarks/generation-one-kernel-h200.json",), "d921a30", "2026-11-27"),
)
FRONTIER = Entry("", ("cascade/frontier.json",), "0904796", "2026-11-26")
TRAINED_BY = {  # what trains a model of the frontier, by the beginning of its name there
    "full": "newllm finetune --config smollm2_135m --num_epochs 2 --patience 1",
    "LoRA": "newllm finetune --config lora",
    "**CASCADE `plus`**": "python cascade.py --config plus",
    "**CASCADE `cheaper`**": "python cascade.py --config cheaper",
    "depth pruning": "newllm finetune --config pruned",
    "base alone": "",
}
WHERE = ["card", "command, file"]


def words() -> str:
    """New-LLM on 1,000 words: validation and test perplexity by seed."""
    published = load("published.json")
    rows = [
        ["2025-01-18", "-", f"`{name}`, published", f"{known['parameters']['value']:,}",
         number(known["best_val_ppl"]["value"]), "-", "-", known["device"], "[published](results/published.json)"]
        for name, known in sorted(published["newllm"].items())
    ]  # fmt: skip
    lowest = min(known["best_val_ppl"]["value"] for known in published["newllm"].values())
    for entry in WORDS:
        runs: Rows = entry.loaded
        members: Rows = runs[0].get("members", runs)
        validation = [member["best"]["val_ppl"] for member in members]
        leads, lowest = statistics.mean(validation) < lowest, min(lowest, statistics.mean(validation))
        rows.append(entry.cells(
            f"{members[0]['parameters']:,}", _bold(_each(validation), leads),
            _each([member["test"]["ppl"] for member in members]), f"{sum(run['seconds'] for run in runs):.0f} s",
        ))  # fmt: skip
    header = ["day", "commit", "model", "parameters", "val PPL (3 seeds)", "test PPL", "all seeds took", *WHERE]
    return markdown_table(header, rows)


def stream() -> str:
    """New-LLM on all of WikiText-2 as one stream: of each search the best on validation, and what it has on test."""
    found = [(entry, min(entry.loaded[0]["members"], key=_validation)) for entry in STREAM]
    lowest = min(_validation(member) for _, member in found)
    rows = []
    for entry, member in found:
        settings = ", ".join(f"{name}={shown(value)}" for name, value in member["settings"].items())
        rows.append(entry.cells(
            settings, f"{member['parameters']:,}", f"{member['best']['epoch']} of {member['epochs']}",
            _bold(number(_validation(member)), _validation(member) == lowest), number(member["test"]["ppl"]),
        ))  # fmt: skip
    header = ["day", "commit", "model", "chosen", "parameters", "best epoch", "val PPL (1 seed)", "test PPL", *WHERE]
    return markdown_table(header, rows)


def frontier() -> str:
    """Test perplexity over the cost of a token; in bold what no other model beats in both."""
    found = by_model("frontier", "frontier-seeds", "frontier-exits")
    points = {name: (round(chosen(seeds[0])["flops"], 2), chosen(seeds[0])["ppl"]) for name, seeds in found.items()}
    rows = []
    for name, seeds in sorted(found.items(), key=lambda item: points[item[0]]):
        trained_by = next((command for start, command in TRAINED_BY.items() if name.startswith(start)), None)
        if trained_by is None or (len(seeds) < 3 and trained_by):
            continue  # not three seeds
        leads = not any(_beats(other, points[name]) for other in points.values())
        figures = " / ".join(number(chosen(each)["ppl"]) for each in seeds)
        rows.append([
            FRONTIER.day, f"`{FRONTIER.commit}`", name.replace("**", ""), f"{points[name][0]:.2f}",
            _bold(figures, leads), f"{seeds[0]['trained_parameters']:,}", FRONTIER.loaded[0]["environment"]["device"],
            f"`{trained_by}`" if trained_by else "-",
        ])  # fmt: skip
    header = ["day", "commit", "model", "cost of a token", "test PPL (by seed)", "trained parameters", "card",
              "trained by"]  # fmt: skip
    return markdown_table(header, rows)


def training() -> str:
    """Whole runs at the published settings: an epoch with validation and checkpoint, and all of it."""
    rows = []
    for entry in TRAINING:
        runs = entry.loaded
        epoch = _epoch(entry)
        figures = f"{epoch:.2f} s", " / ".join(f"{run['seconds']:.0f} s" for run in runs)
        leads = all(epoch <= _epoch(other) for other in TRAINING if other.what == entry.what)
        rows.append(entry.cells(_bold(figures[0], leads), figures[1]))
    return markdown_table(["day", "commit", "work", "an epoch, all of it", "a run (3 seeds)", *WHERE], rows)


def updates() -> str:
    """The updates of an epoch alone, in the fastest precision, beside the fastest PyTorch that does the same ones."""
    rows = []
    for entry in UPDATES:
        (measured,) = (config["rows"] for config in entry.loaded[0]["configs"].values())
        timed = [row for row in measured if "error" not in row and "for scale" not in row["name"]]
        ours = min((row for row in timed if row["name"] == "newllm_jax"), key=_epoch_seconds)
        peer = min((row for row in timed if row["name"] != "newllm_jax"), key=_epoch_seconds)
        rows.append(entry.cells(
            f"**{ours['epoch_seconds']:.2f} s** ({ours['precision']})",
            f"{peer['epoch_seconds']:.2f} s ({peer['name']}, {peer['precision']})",
        ))  # fmt: skip
    return markdown_table(["day", "commit", "work", "updates of an epoch", "fastest PyTorch", *WHERE], rows)


def generation() -> str:
    """SmolLM2-135M making text greedily, by number of texts and precision: the fastest form of each file."""
    found: dict[tuple[int, str], list[tuple[Entry, dict[str, Any]]]] = {}
    for entry in GENERATION:
        for row in entry.loaded[0]["rows"]:
            ours = row["form"] != "transformers" and row["sampling"] == "greedy" and not row.get("stage_layers")
            if ours and "error" not in row and (row["precision"] != "fp32" or row["same_tokens"] == len(row["ids"])):
                found.setdefault((row["batch"], row["precision"]), []).append((entry, row))
    rows = []
    for (batch, precision), measured in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "fp32")):
        most = max(_rate(row) for _, row in measured)
        for entry in GENERATION:
            of_entry = [row for each, row in measured if each is entry]
            if not of_entry:
                continue
            best = max(of_entry, key=_rate)
            rate = _bold(f"{_rate(best):,.0f}", _rate(best) == most)
            day, commit, _, *figures, _, command = entry.cells(str(batch), precision, best["form"], rate)
            rows.append([day, commit, *figures, entry.loaded[0]["environment"]["device"], command])
    return markdown_table(["day", "commit", "texts", "precision", "form", "tokens/s", *WHERE], rows)


def _validation(member: dict[str, Any]) -> float:
    return member["best"]["val_ppl"]


def _rate(row: dict[str, Any]) -> float:
    return row["tokens_per_second"]["median"]


def _epoch(entry: Entry) -> float:
    return statistics.median(each["seconds"] for run in entry.loaded for each in run["epochs"])


def _epoch_seconds(row: dict[str, Any]) -> float:
    return row["epoch_seconds"]


def _beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
    """Whether another point costs no more and has no higher perplexity, and is not the same."""
    return other != point and other[0] <= point[0] and other[1] <= point[1]


def _bold(text: str, leads: bool) -> str:
    return f"**{text}**" if leads else text


def _each(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


LEADERBOARD_TABLES: dict[str, Callable[[], str]] = {
    "leaderboard words": words,
    "leaderboard stream": stream,
    "leaderboard frontier": frontier,
    "leaderboard training": training,
    "leaderboard updates": updates,
    "leaderboard generation": generation,
}
