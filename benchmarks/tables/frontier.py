"""Tables of quality against compute: `newllm frontier` over the designs of CASCADE and their competitors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.tables.experiments import NONE_YET
from benchmarks.tables.files import RESULTS, load
from newllm_jax.report.tables import markdown_table, number
from newllm_jax.training.losses import perplexity

SPEEDS = ("frontier-speed-cheaper", "frontier-speed-wide")
NAMES = {  # of runs, as the tables have them
    "base": "base alone",
    "cascade-plus": "**CASCADE `plus`**: re-entry at layer 8, LoRA",
    "cascade-cheaper": "**CASCADE `cheaper`**: layers 14 to 17 skipped, short head",
    "finetune-lora": "LoRA on the base (`finetune --config lora`)",
    "finetune-smollm2_135m": "full fine-tuning",
    "finetune-last8": "fine-tuning of the last 8 layers",
    "finetune-pruned": "depth pruning: 6 layers out, LoRA (`--config pruned`)",
    "cascade-published": "CASCADE as published",
    "cascade-skip-14-20": "layers 14 to 19 skipped, whole head (all tokens easy)",
    "cascade-exit-24": "early exit after layer 24 (all tokens easy)",
}


def entries(*files: str) -> list[dict[str, Any]]:
    """The entries of those files that there are."""
    there = [name for name in files if (RESULTS / "cascade" / f"{name}.json").exists()]
    return [entry for name in there for entry in load(f"cascade/{name}.json")["entries"]]


def by_model(*files: str) -> dict[str, list[dict[str, Any]]]:
    """The entries of a model's own rule for paths, a seed each, by its name; the published ones by their ratio."""
    models: dict[str, list[dict[str, Any]]] = {}
    for entry in entries(*files):
        if entry["policy"] in ("oracle", "random") or (entry["system"] == "base" and NAMES["base"] in models):
            continue
        config, name = entry["config"], str(entry["name"]).split(", seed")[0]
        name = NAMES.get(name, name)
        if entry["system"] == "cascade" and not config["skipped_layers"] and config["start"] != "base":
            name += f", hard ratio {config['hard_ratio']:g}, stages: {config['num_stages']}"
        seeds = models.setdefault(name, [])
        if not any(other["config"]["seed"] == entry["config"]["seed"] for other in seeds):
            seeds.append(entry)
    return models


def drawn_entries() -> list[dict[str, Any]]:
    """What the plot of the frontier has: every design and competitor once, the base first."""
    drawn: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries("frontier", "frontier-published", "frontier-designs", "frontier-exits"):
        own = entry["name"].startswith(("base", "cascade-plus,", "cascade-cheaper,"))
        is_base = entry["system"] == "base"
        if entry["config"]["seed"] == 0 and (own or is_base or entry["policy"] in ("criterion", "none")):
            name = "base" if is_base else entry["name"].split(", seed")[0].split("-", 1)[1]
            if name == "published":
                name += f" {entry['config']['hard_ratio']:g}"
            drawn.setdefault((name, entry["policy"]), {**entry, "name": name})
    return list(drawn.values())


def chosen(entry: dict[str, Any]) -> dict[str, Any]:
    """The point of an entry at the threshold of its run."""
    return entry.get("chosen") or entry["points"][0]


def frontier_summary() -> str:
    """One line a model: what is trained, the cost of a token, test perplexities by seed, and the loss elsewhere."""
    models = by_model("frontier", "frontier-published", "frontier-seeds", "frontier-exits")
    if not models:
        return NONE_YET
    header = ["model", "trained parameters", "cost of a token", "test PPL (by seed)", "95 % interval of the first",
              "loss on WikiText-2"]  # fmt: skip
    return markdown_table(header, [
        [
            name, f"{seeds[0]['trained_parameters']:,}", f"{chosen(seeds[0])['flops']:.2f}",
            " / ".join(number(chosen(each)["ppl"]) for each in seeds),
            f"{_ppl(chosen(seeds[0])['low'])} to {_ppl(chosen(seeds[0])['high'])}",
            " / ".join(f"{next(iter(each['elsewhere'].values()))['loss']:.3f}" for each in seeds),
        ]
        for name, seeds in sorted(models.items(), key=lambda item: chosen(item[1][0])["loss"])
    ])  # fmt: skip


def frontier_curves() -> str:
    """One line a curve: test perplexity over the cost of a token."""
    rows = list(_curves("frontier", "frontier-published", "frontier-designs", "frontier-exits"))
    header = ["model", "hard tokens chosen by", "cost of a token: test PPL, at 0, 10, ... 100 % hard tokens"]
    return markdown_table(header, rows) if rows else NONE_YET


def _curves(*files: str) -> Iterator[list[str]]:
    for entry in entries(*files):
        if len(entry["points"]) > 1:
            rule = entry["config"]["criterion"] if entry["policy"] == "criterion" else entry["policy"]
            points = ", ".join(f"{each['flops']:.2f}: {number(each['ppl'])}" for each in entry["points"])
            ratio = f", hard ratio {entry['config']['hard_ratio']:g}" if "published" in entry["name"] else ""
            yield [entry["name"] + ratio, rule, points]


def frontier_data() -> str:
    """What more training rows change: gains over the base, on the test chunks, with 1,000 and with 2,200 chunks."""
    few, many = by_model("frontier"), by_model("frontier-more")
    if not many:
        return NONE_YET

    def gain(models: dict[str, list[dict[str, Any]]], name: str) -> str:
        return f"{chosen(models[NAMES['base']][0])['loss'] - chosen(models[name][0])['loss']:.3f}"

    header = ["model", "gain over the base, 1,000 chunks", "2,200 chunks", "cost of a token"]
    return markdown_table(header, [
        [name, gain(few, name), gain(many, name), f"{chosen(many[name][0])['flops']:.2f}"]
        for name in many
        if name in few and name != NAMES["base"]
    ])  # fmt: skip


def frontier_speed() -> str:
    """Tokens a second of generation at each threshold, one text and 32 texts, beside the base in the same process."""
    rows = []
    for name in SPEEDS:
        found = entries(name)
        base = next((entry["points"][0]["speed"] for entry in found if entry["name"] == "base"), None)
        for entry in found:
            if entry["policy"] not in ("criterion", "none"):
                continue
            points = [chosen(entry), *(entry["points"][::5] if len(entry["points"]) > 1 else [])]
            for number_, each in enumerate(points):
                one, many = each["speed"]["1"], each["speed"]["32"]
                assert base is not None
                rows.append([
                    entry["name"] if number_ == 0 else "", f"{each['flops']:.2f}", number(each["ppl"]),
                    *(f"{now['tokens_per_second']:,.0f} "
                      f"({now['tokens_per_second'] / before['tokens_per_second']:.2f}x)"
                      for now, before in ((one, base["1"]), (many, base["32"]))),
                    " ".join(f"{rate:.0%}" for rate in one["exit_rates"]),
                ])  # fmt: skip
    header = ["model", "cost of a token (test)", "test PPL", "tokens/s, one text (against the base)", "32 texts",
              "exits of the text"]  # fmt: skip
    return markdown_table(header, rows) if rows else NONE_YET


def _ppl(loss: float) -> str:
    return number(perplexity(loss))


FRONTIER_TABLES: dict[str, Callable[[], str]] = {
    "cascade frontier": frontier_summary,
    "cascade frontier curves": frontier_curves,
    "cascade frontier data": frontier_data,
    "cascade frontier speed": frontier_speed,
}
