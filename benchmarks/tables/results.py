"""The tables of whole runs, New-LLM's and CASCADE's, beside the published figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.tables.files import load, load_all
from newllm_jax.report.cascade_tables import configuration_name, exit_group_table, verdict
from newllm_jax.report.compare import differences, ensemble_columns, stages_table
from newllm_jax.report.published import PUBLISHED_RUNS
from newllm_jax.report.tables import markdown_table, number

SEEDS = (0, 1, 2)


def newllm_runs(config: str) -> list[dict[str, Any]]:
    """The committed runs of a configuration, by seed."""
    return [load(f"newllm/{config}-seed{seed}.json") for seed in SEEDS]


def newllm_summary() -> str:
    """Published and own best perplexities, one line a configuration."""
    rows = []
    for config, published in load("published.json")["newllm"].items():
        own = newllm_runs(config)
        first = own[0]
        seconds = statistics.median(entry["seconds"] for run in own for entry in run["epochs"])
        best = f"{published['best_val_ppl']['value']:.2f} ({published['device']})"
        rows.append([
            f"`{config}`", f"{first['parameters']:,}", best,
            _each([run["best"]["val_ppl"] for run in own]), _each([run["test"]["ppl"] for run in own]),
            str(len(first["epochs"])), f"{seconds:.1f} s", f"{first['peak_memory_bytes'] / 2**30:.2f} GiB",
        ])  # fmt: skip
    header = ["config", "parameters", "published val PPL", "ours, val PPL (3 seeds)", "ours, test PPL", "epochs",
              "an epoch", "memory"]  # fmt: skip
    return markdown_table(header, rows)


def newllm_recipes() -> str:
    """The recipes by seed, beside peers of PyTorch that had a search of their own."""
    rows = []
    for name, sweep in load_all("recipes").items():
        if sweep["config"]["seed"] != 0 or list(sweep["grid"]) != ["seed"]:
            continue  # a search
        members = sorted(sweep["members"], key=lambda member: member["settings"]["seed"])
        rows.append([
            f"`{name}`", f"{members[0]['parameters']:,}",
            _each([member["best"]["val_ppl"] for member in members]),
            _each([member["test"]["ppl"] for member in members]),
            " / ".join(str(member["best"]["epoch"]) for member in members), str(members[0]["epochs"]),
            f"{sweep['seconds']:.0f} s",
        ])  # fmt: skip
    header = ["recipe", "parameters", "val PPL (3 seeds)", "test PPL", "best epochs", "epochs", "all seeds took"]
    return markdown_table(header, rows)


def newllm_epochs(config: str) -> str:
    """Validation perplexity, published and ours, at every epoch for which one was published."""
    published, own = load("published.json")["newllm"][config], newllm_runs(config)
    rows = [
        [epoch, f"{figure['value']:.1f}", figure["source"]]
        + [f"{run['epochs'][int(epoch) - 1]['val_ppl']:.1f}" for run in own]
        for epoch, figure in published["val_ppl"].items()
    ]
    return markdown_table(["epoch", "published", "source", *(f"seed {seed}" for seed in SEEDS)], rows)


def newllm_plateau() -> str:
    """Validation perplexity by epoch: the published model, published and ours, and the recipes; of ours the means."""
    published = load("published.json")["newllm"]["advanced"]["val_ppl"]
    epochs = [1, 5, 10, 15, 20, 30, 40, 50]
    rows = [["`advanced`, published", "512", *(number(published[str(epoch)]["value"]) for epoch in epochs)]]
    runs = newllm_runs("advanced")
    curves = [[entry["val_ppl"] for entry in run["epochs"]] for run in runs]
    rows.append(["`advanced`, ours", str(runs[0]["config"]["batch_size"]), *_means(curves, epochs)])
    for name in ("baseline_plus", "advanced_plus"):
        sweep = load(f"recipes/{name}.json")
        curves = [member["val_ppl"] for member in sweep["members"]]
        rows.append([f"`{name}`, ours", str(sweep["config"]["batch_size"]), *_means(curves, epochs)])
    return markdown_table(["model", "batch", *(f"epoch {epoch}" for epoch in epochs)], rows)


def _means(curves: list[list[float]], epochs: list[int]) -> list[str]:
    """The mean of several curves at some epochs; a dash where they have ended."""
    return [number(statistics.mean(curve[epoch - 1] for curve in curves)) if epoch <= len(curves[0]) else "-"
            for epoch in epochs]  # fmt: skip


def newllm_extended() -> str:
    """The planned continuation of the advanced run to 100 epochs."""
    epochs = load("newllm/advanced-loops-seed0-resumed100.json")["epochs"]
    marks = [50, 60, 70, 80, 90, 100]
    figures = [f"{epochs[mark - 1]['val_ppl']:.2f}" for mark in marks]
    return markdown_table(["epoch", *map(str, marks)], [["val PPL", *figures]])


def newllm_cpu() -> str:
    """The baseline's first epoch without a GPU."""
    rows = []
    for name, run in load_all("newllm", "baseline-epoch1-*.json").items():
        epoch = run["epochs"][0]
        rows.append([_link("newllm", name), f"{epoch['seconds'] / 60:.1f} min", f"{epoch['val_ppl']:.1f}"])
    return markdown_table(["run", "an epoch", "val PPL"], rows)


def newllm_commands() -> str:
    """The command, device and versions of every committed run."""
    rows = []
    for name, run in load_all("newllm").items():
        rows.append([_link("newllm", name), f"`{run['command']}`", _machine(run), f"{run['seconds']:.0f} s"])
    return markdown_table(["run", "command", "on", "took"], rows)


def cascade_runs() -> list[dict[str, Any]]:
    """The published runs and ours, under short names."""
    own = [{**load(f"cascade/ratio0{ratio}.json"), "name": f"ours, 0.{ratio}"} for ratio in (6, 9)]
    return [*PUBLISHED_RUNS, *own]


def cascade_summary() -> str:
    """Perplexity over all tokens: the base, the base with stages, and fine-tuning as the control."""
    tuned = load_all("cascade", "finetune-*.json").values()
    base = load("cascade/ratio06.json")["base"]
    rows = [["base alone, frozen", f"{base['parameters']:,}", "7.89", number(base["val_ppl"])]]
    published, _, six, nine = cascade_runs()
    for run, reference in ((six, published), (nine, None)):
        for row in (run["ensemble"][1], run["ensemble"][-1]):
            figure = number(reference["ensemble"][row["stages"]]["val_ppl"]) if reference else "-"
            name = f"{configuration_name(row['stages'])}, hard ratio {run['config']['hard_ratio']:g}"
            rows.append([name, f"{row['parameters']:,}", figure, number(row["val_ppl"])])
    for run in tuned:
        name = f"base fine-tuned, lr {run['config']['learning_rate']:g}, epoch {run['best']['epoch']}"
        rows.append([name, f"{run['parameters']:,}", "-", number(run["best"]["val_ppl"])])
    return markdown_table(["model", "parameters", "published val PPL", "ours"], rows)


def cascade_commands() -> str:
    """The command, device and memory of every committed run."""
    rows = []
    for name, run in load_all("cascade").items():
        if "system" not in run:
            continue  # a measurement, not a run
        rows.append([
            _link("cascade", name), f"`{run['command']}`", _machine(run), f"{run['seconds']:.0f} s",
            f"{run['peak_memory_bytes'] / 2**30:.2f} GiB",
        ])  # fmt: skip
    return markdown_table(["run", "command", "on", "took", "memory"], rows)


def _each(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _link(folder: str, name: str) -> str:
    return f"[{name}]({folder}/{name}.json)"


def _machine(run: dict[str, Any]) -> str:
    environment = run["environment"]
    return f"{environment['device']}, {environment['precision']}, jax {environment['jax']}"


RESULTS_TABLES: dict[str, Callable[[], str]] = {
    "newllm summary": newllm_summary,
    "newllm recipes": newllm_recipes,
    "newllm baseline epochs": lambda: newllm_epochs("baseline"),
    "newllm advanced epochs": lambda: newllm_epochs("advanced"),
    "newllm plateau": newllm_plateau,
    "newllm extended": newllm_extended,
    "newllm cpu": newllm_cpu,
    "newllm commands": newllm_commands,
    "cascade summary": cascade_summary,
    "cascade differences": lambda: differences(cascade_runs()),
    "cascade stages": lambda: stages_table(cascade_runs()),
    "cascade ensemble": lambda: ensemble_columns(cascade_runs()),
    "cascade exits": lambda: exit_group_table(load("cascade/ratio06.json")["ensemble"][-1]),
    "cascade verdict": lambda: verdict(load("cascade/ratio06.json")),
    "cascade commands": cascade_commands,
}
