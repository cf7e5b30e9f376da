"""The tables of CASCADE: each stage's hard tokens beside all tokens, the ensemble, and whether handing on pays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from newllm_jax.report.markup import escaped
from newllm_jax.report.tables import markdown_table, number

PUBLISHED_DATA = "tatsu-lab/alpaca"
PUBLISHED_BASES = {
    "cascade": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "finetune": "HuggingFaceTB/SmolLM2-360M-Instruct",
}


def configuration_name(stages: int) -> str:
    """`Base`, `Base+1`, ..."""
    return "Base" if stages == 0 else f"Base+{stages}"


def verdict(results: dict[str, Any]) -> str:
    """One sentence: which configuration is best over all tokens, and by how much."""
    ensemble = results["ensemble"]
    base, best = ensemble[0], min(ensemble, key=lambda entry: entry["val_loss"])
    if len(ensemble) == 1:
        return f"Base has PPL {number(base['val_ppl'])} over all tokens."
    others = [entry for entry in ensemble if entry is not best]
    second = min(others, key=lambda entry: entry["val_loss"])
    if best is base:
        return (
            f"Over all tokens the base alone is best: PPL {number(base['val_ppl'])}, against "
            f"{number(second['val_ppl'])} of the best ensemble ({configuration_name(second['stages'])}, "
            f"{second['val_loss'] - base['val_loss']:+.4f} nats): handing tokens on makes the model worse."
        )
    return (
        f"Over all tokens {configuration_name(best['stages'])} is best: PPL {number(best['val_ppl'])}, against "
        f"{number(base['val_ppl'])} of the base alone ({best['val_loss'] - base['val_loss']:+.4f} nats)."
    )


def tokens_of_stages(config: Mapping[str, Any]) -> str:
    """Which tokens the perplexities of a stage by epoch are of: `hard` or `all`."""
    return "all" if config.get("skipped_layers") or config.get("trained_on") == "all" else "hard"


def stage_table(results: dict[str, Any]) -> str:
    """One line a stage: its hard tokens, and what its validation perplexity on them is beside that over all tokens."""
    header = ["stage", "layers", "parameters", "train tokens", "val tokens", "threshold",
              f"{tokens_of_stages(results['config'])}-token PPL last", "best (epoch)", "all-token PPL Base+k",
              "seconds"]  # fmt: skip
    ensemble = {entry["stages"]: entry for entry in results["ensemble"]}
    return markdown_table(header, [
        [
            str(stage["stage"]), str(stage["total_layers"]), f"{stage['total_parameters']:,}",
            f"{stage['train_tokens']:,}", f"{stage['val_tokens']:,}", f"{stage['threshold']:.4f}",
            number(stage["last"]["val_ppl"]), f"{number(stage['best']['val_ppl'])} ({stage['best']['epoch']})",
            number(ensemble[stage["stage"]]["val_ppl"]), f"{stage['seconds']:.1f}",
        ]
        for stage in results["stages"]
    ])  # fmt: skip


def ensemble_table(results: dict[str, Any]) -> str:
    """One line a configuration: perplexity over all validation tokens, and where they exit."""
    names = [configuration_name(entry["stages"]) for entry in results["ensemble"]]
    header = ["model", "parameters", "val loss", "val PPL", "accuracy", "exit rates (base, stage 1, ...)"]
    has_costs = all("flops" in entry for entry in results["ensemble"])
    return markdown_table([*header, *(["cost of a token"] if has_costs else [])], [
        [
            name, f"{entry['parameters']:,}", f"{entry['val_loss']:.4f}", number(entry["val_ppl"]),
            f"{entry['val_accuracy']:.1%}", " ".join(f"{rate:.1%}" for rate in entry["exit_rates"]),
            *([f"{entry['flops']:.3f}"] if has_costs else []),
        ]
        for name, entry in zip(names, results["ensemble"], strict=True)
    ])  # fmt: skip


def test_table(results: dict[str, Any]) -> str:
    """One line a configuration: perplexity over all test tokens; "" for a run without any."""
    if "test" not in results:
        return ""
    table = markdown_table(["model", "test loss", "test PPL", "cost of a token"], [
        [configuration_name(row["stages"]), f"{row['loss']:.4f}", number(row["ppl"]), f"{row['flops']:.3f}"]
        for row in results["test"]
    ])  # fmt: skip
    return f"Over the {results['data']['test_chunks']:,} test chunks, on which nothing was chosen:\n\n{table}\n\n"


def design_text(config: dict[str, Any]) -> str:
    """What a run trained, in words."""
    trained = f"LoRA adapters of rank {config.get('rank')}" if config.get("weights") == "lora" else "layers of its own"
    if span := config.get("skipped_layers"):
        head = f", with exact scores for {config['short_head']:,} ids" if config["short_head"] else ""
        return f"easy tokens skip layers {span[0]} to {span[1] - 1}{head}; {trained} on all layers"
    if config.get("context", "token") == "token" and config.get("start", "random") == "random":
        return f"{config['num_stages']} of {config['stage_layers']} new layers"
    entry = "after the last layer" if config["entry_layer"] is None else f"at layer {config['entry_layer']}"
    return (
        f"one, entered {entry}, that sees the {config['context']}: {trained}, {config['start']} start, "
        f"head {config['head']}, trained on {config['trained_on']} tokens"
    )


def exit_group_table(entry: dict[str, Any]) -> str:
    """One line for the tokens of each exit: the base's loss on them, and that of where they exit."""
    rows = []
    for group in entry["exit_groups"]:
        lost = None if None in (group["loss"], group["base_loss"]) else group["loss"] - group["base_loss"]
        name = "base" if group["exit"] == 0 else f"stage {group['exit']}"
        verdict = "-" if not lost else ("worse" if lost > 0 else "better")
        rows.append([name, f"{group['tokens']:,}", number(group["base_loss"], 4), number(group["loss"], 4),
                     "-" if lost is None else f"{lost:+.4f}", verdict])  # fmt: skip
    return markdown_table(["exit", "tokens", "base's loss on them", "loss at their exit", "difference", ""], rows)


def evaluation_text(results: dict[str, Any]) -> str:
    """What `newllm evaluate` prints of an ensemble."""
    return "\n\n".join([ensemble_table(results), exit_group_table(results["ensemble"][-1]), verdict(results)])


def stage_epochs(results: dict[str, Any]) -> str:
    """One line for each epoch of each stage."""
    header = ["stage", "epoch", "train loss", "val loss", "val PPL", "val accuracy", "tokens/s", "seconds"]
    return markdown_table(header, [
        [
            str(stage["stage"]), str(entry["epoch"]), f"{entry['train_loss']:.4f}", f"{entry['val_loss']:.4f}",
            number(entry["val_ppl"]), f"{entry['val_accuracy']:.1%}", f"{entry['tokens_per_second']:,.0f}",
            f"{entry['seconds']:.1f}",
        ]
        for stage in results["stages"]
        for entry in stage["epochs"]
    ])  # fmt: skip


def provenance_warning(results: dict[str, Any]) -> str:
    """What forbids a comparison with the published figures: other rows, other weights, fewer chunks; "" if nothing."""
    published_base = PUBLISHED_BASES[results["system"]]
    data, base, config = results["data"], results["base"], results["config"]
    reasons = []
    if data["fallback"]:
        reasons.append(
            f"{escaped(data['asked'])} was not available ({escaped(data['fallback'])}), so the rows are those of "
            f"{escaped(data['source'])}"
        )
    elif data["source"] != PUBLISHED_DATA:
        reasons.append(f"the rows are those of {escaped(data['source'])}, the published ones of {PUBLISHED_DATA}")
    if base["fallback"]:
        reasons.append(
            f"{escaped(base['asked'])} was not available ({escaped(base['fallback'])}), so the weights are "
            f"{escaped(base['source'])}"
        )
    elif base["source"] != published_base:
        reasons.append(f"the weights are {escaped(base['source'])}, the published ones {published_base}")
    chunks = data["train_chunks"], data["validation_chunks"]
    if chunks != (1000, 100):
        reasons.append(f"there are {chunks[0]:,} + {chunks[1]:,} chunks instead of 1,000 + 100")
    for name, cut in (("train_chunks", chunks[0]), ("validation_chunks", chunks[1])):
        if config[name] is not None and cut < config[name]:
            reasons.append(f"the source had not enough rows for {config[name]:,} {name}")
    return "" if not reasons else "> **Not comparable with the published figures:** " + "; ".join(reasons) + ".\n\n"
