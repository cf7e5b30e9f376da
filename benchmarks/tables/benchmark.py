"""Markdown tables of the JSON files that the benchmarks write; nothing is measured here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.tables.generation import text_table
from benchmarks.tables.phases import cluster_table, phase_table
from benchmarks.tables.signal import signal_table
from newllm_jax.report.cascade_tables import configuration_name
from newllm_jax.report.tables import markdown_table, number

MIB, GIB = 2**20, 2**30


def benchmark_tables(results: dict[str, Any]) -> str:
    """All tables of a file, each under its name."""
    return "\n\n".join(f"**{title}**\n\n{table}" for title, table in tables_of(results).items())


def tables_of(results: dict[str, Any]) -> dict[str, str]:
    """The tables of a file by title."""
    kind = results["benchmark"], results.get("sweep")
    found = {title: table(results) for title, table in TABLES.get(kind, {}).items()}
    return {title: table for title, table in found.items() if table}


def machine_table(results: dict[str, Any]) -> str:
    """Device, versions, ceilings."""
    environment, ceilings = results["environment"], results["ceilings"]
    torch = environment.get("torch") or "absent"
    read = ceilings.get("read_bytes_per_second")  # older files have none
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings["flops_per_second"].items())
    return markdown_table(["machine", "value"], [
        ["device", f"{environment['device']}, {environment['cores']} cores"],
        ["versions", f"jax {environment['jax']}, torch {torch}, Python {environment['python']}"],
        ["large product, TFLOP/s", rates],
        ["large copy, GB/s", f"{ceilings['bytes_per_second'] / 1e9:.4g}"],
        *([["one row times a matrix, GB/s", f"{read / 1e9:.4g}"]] if read else []),
        ["load when it began", f"{environment['load_average']:.1f}"],
    ])  # fmt: skip


def update_table(results: dict[str, Any]) -> str:
    """Time, memory and utilisation of an update, a line a row of every configuration."""
    header = ["config", "what", "precision", "an update, ms (min to max)", "an epoch, s", "x ours", "ready after, s",
              "memory, MiB", "FLOP/s of ceiling", "bytes/s of ceiling"]  # fmt: skip
    rows = []
    for config, entry in results["configs"].items():
        for row in entry["rows"]:
            if "error" in row:
                rows.append([config, row["name"], "-", row["error"], *["-"] * 6])
                continue
            seconds = row["update_seconds"]
            rows.append([
                config, row["name"], row["precision"], _span(seconds), f"{row['epoch_seconds']:.2f}",
                f"{row['times_ours']:.2f}", f"{row['prepare_seconds']:.1f}", _memory(row),
                _share(row.get("flops_fraction")), _share(row.get("bytes_fraction")),
            ])  # fmt: skip
    return markdown_table(header, rows)


def loss_table(results: dict[str, Any]) -> str:
    """How far every re-creation's losses are from the library's after the same updates."""
    header = ["config", "what", "last timed loss", "largest difference, nats", "by chance, nats", "strict, relative"]
    rows = [
        [
            config, row["name"], f"{row['losses'][-1]:.4f}", f"{row['agreement']['timed']:.2g}",
            _figure(row["agreement"].get("by_chance")), _figure(row["agreement"].get("strict")),
        ]
        for config, entry in results["configs"].items()
        for row in entry["rows"] if "agreement" in row
    ]  # fmt: skip
    return markdown_table(header, rows)


def size_table(results: dict[str, Any]) -> str:
    """Time per token, tokens a second and memory by length or batch."""
    header = ["config", "batch", "length", "an update, ms", "per token, us", "tokens/s", "memory, MiB"]
    rows = []
    for config, entry in results["configs"].items():
        for row in entry["rows"]:
            line = [config, f"{row['batch_size']:,}", f"{row['sequence_length']:,}"]
            if "error" in row:
                rows.append([*line, row["error"], "-", "-", "-"])
                continue
            rows.append([
                *line, _ms(row["update_seconds"]["median"]), f"{1e6 * row['seconds_per_token']:.3f}",
                f"{row['tokens_per_second']:,.0f}", f"{row['planned_memory_bytes'] / MIB:,.0f}",
            ])  # fmt: skip
    return markdown_table(header, rows)


def form_table(results: dict[str, Any]) -> str:
    """Time of an update by form of the time loop, within a configuration, batch size and precision."""
    header = ["config", "texts", "precision", "time loop", "an update, ms (min to max)", "x first",
              "ready after, s", "planned memory, MiB", "last timed loss"]  # fmt: skip
    rows = []
    for config, entry in results["configs"].items():
        first: dict[tuple[int, str], float] = {}
        for row in entry["rows"]:
            seconds, texts = row["update_seconds"], row.get("texts", entry["config"]["batch_size"])
            times = seconds["median"] / first.setdefault((texts, row["precision"]), seconds["median"])
            rows.append([
                config, f"{texts:,}", row["precision"], row["form"], _span(seconds), f"{times:.2f}",
                f"{row['prepare_seconds']:.1f}", f"{row['planned_memory_bytes'] / MIB:,.0f}",
                f"{row['losses'][-1]:.4f}",
            ])  # fmt: skip
    return markdown_table(header, rows)


def best_loss_cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of several runs: number, mean of the best validation losses with its error, spread, and perplexities."""
    losses = [row["best"]["val_loss"] for row in rows]
    mean, spread = statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else math.nan
    return [
        str(len(losses)), f"{mean:.4f} +- {spread / math.sqrt(len(losses)):.4f}", f"{spread:.4f}",
        f"{math.exp(mean):.2f}", f"{math.exp(min(losses)):.2f} to {math.exp(max(losses)):.2f}",
    ]  # fmt: skip


BEST_LOSSES = ["seeds", "best val loss, mean +- its error", "spread of runs", "PPL of the mean",
               "lowest to highest PPL"]  # fmt: skip


def newllm_seed_table(results: dict[str, Any]) -> str:
    """Where whole runs of New-LLM end, by configuration and precision."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["config"], row["precision"]), []).extend([] if "error" in row else [row])
    rows = [[*key, *best_loss_cells(group)] if group else [*key, "0", *["-"] * 4] for key, group in groups.items()]
    return markdown_table(["config", "precision", *BEST_LOSSES], rows)


def cascade_seed_table(results: dict[str, Any]) -> str:
    """Whole runs of CASCADE: the best perplexity of each stage on its hard tokens, and the ensemble's on all."""
    runs = [run for run in results["rows"] if "error" not in run]
    count = max((len(run["stages"]) for run in runs), default=0)
    rows = []
    for run in results["rows"]:
        if "error" in run:
            rows.append([str(run["seed"]), run["error"], *["-"] * (2 * count)])
            continue
        figures = [number(stage["best"]["val_ppl"]) for stage in run["stages"]]
        rows.append([str(run["seed"]), *figures, *(number(row["val_ppl"]) for row in run["ensemble"])])
    names = [*(f"stage {n}" for n in range(1, count + 1)), *(configuration_name(n) for n in range(count + 1))]
    return markdown_table(["seed", *names], rows)


def generation_table(results: dict[str, Any]) -> str:
    """Memory of generating few words and many."""
    return markdown_table(["config", "words", "words/s", "peak memory, MiB", "of the"], [
        [config, f"{row['tokens']:,}", f"{row['tokens_per_second']:,.0f}", _memory(row, 2), row["peak_memory_of"]]
        for config, entry in results["configs"].items() for row in entry["rows"]
    ])  # fmt: skip


def plan_table(results: dict[str, Any]) -> str:
    """Planned memory against the limit."""
    limit, rows = results["limit_bytes"], []
    for row in results["rows"]:
        if "error" in row:
            rows.append([row["name"], "-", "-", row["error"], "-"])
            continue
        needed = row["estimated_memory_bytes"]
        rows.append([
            row["name"], f"{row['parameters']:,}", f"{row['batch_size']:,}", f"{needed / GIB:.2f} GiB",
            "yes" if needed < limit else "no",
        ])  # fmt: skip
    return markdown_table(["run", "parameters", "batch", "planned memory", f"under {limit / GIB:.0f} GiB"], rows)


def extraction_table(results: dict[str, Any]) -> str:
    """The base's pass over the chunks."""
    entry = results.get("extraction")
    if not entry:
        return ""
    header = ["what", "tokens", "seconds (min to max)", f"{entry['full_tokens']:,} tokens, s", "x ours",
              "ready after, s", "memory, MiB", "FLOP/s of ceiling", "largest difference of a loss"]  # fmt: skip
    rows = []
    for row in entry["rows"]:
        if "error" in row:
            rows.append([row["name"], "-", row["error"], *["-"] * 6])
            continue
        seconds = row["pass_seconds"]
        rows.append([
            row["name"], f"{entry['tokens']:,}",
            f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f})", f"{row['full_seconds']:.1f}",
            f"{row['times_ours']:.2f}", f"{row['prepare_seconds']:.1f}", _memory(row), _share(row["flops_fraction"]),
            _figure(row.get("largest_loss_difference")),
        ])  # fmt: skip
    return markdown_table(header, rows)


def startup_table(results: dict[str, Any]) -> str:
    """Seconds from the start of a process."""
    rows = [
        [row["name"], f"{row['seconds']['median']:.2f}", f"{row['seconds']['min']:.2f}", f"{row['seconds']['max']:.2f}",
         str(row["seconds"]["repeats"])] if "error" not in row else [row["name"], row["error"], "-", "-", "-"]
        for row in results["rows"]
    ]  # fmt: skip
    return markdown_table(["from the start of the process", "median, s", "min", "max", "runs"], rows)


def bound_table(results: dict[str, Any]) -> str:
    """Hidden states on disk, and what a process had at most that was held to a bound of memory, a line a run."""
    rows, gib = list[list[str]](), 2**30
    for row in results["rows"]:
        if "error" in row:
            rows.append([row["name"], row["error"], "-", "-", "-", "-"])
            continue
        rows.append([
            row["name"], f"{row['tokens']:,}", f"{row['disk_bytes'] / gib:.1f}", f"{results['bound_bytes'] / gib:g}",
            f"{row['peak_bytes'] / gib:.2f}", f"{row['seconds']:,.0f}",
        ])  # fmt: skip
    header = ["run", "tokens", "on disk, GiB", "bound of the memory, GiB", "had at most, GiB", "seconds"]
    return markdown_table(header, rows)


TABLES: dict[tuple[str, str | None], dict[str, Callable[[dict[str, Any]], str]]] = {
    ("newllm", None): {"machine": machine_table, "updates": update_table, "losses": loss_table},
    ("newllm", "length"): {"length": size_table},
    ("newllm", "batch"): {"batch": size_table},
    ("newllm", "forms"): {"forms": form_table},
    ("newllm", "phases"): {"phases": phase_table},
    ("newllm", "seeds"): {"seeds": newllm_seed_table},
    ("newllm", "memory"): {"generation": generation_table},
    ("newllm", "plan"): {"plan": plan_table},
    ("cascade", None): {
        "machine": machine_table, "updates": update_table, "losses": loss_table, "extraction": extraction_table
    },
    ("cascade", "plan"): {"plan": plan_table},
    ("cascade", "seeds"): {"seeds": cascade_seed_table},
    ("memory_bound", None): {"bound": bound_table},
    ("startup", None): {"startup": startup_table},
    ("signal", None): {"signal": signal_table},
    ("clusters", None): {"phases": cluster_table},
    ("generation", None): {"machine": machine_table, "generation": text_table},
}  # fmt: skip


def file_tables(files: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Callable[[], str]]:
    """For the pages: the tables of `(stem, results)` files as `benchmark STEM TITLE`."""
    return {
        f"benchmark {stem} {title}": (lambda table=table: table)
        for stem, results in files
        for title, table in tables_of(results).items()
    }


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _span(seconds: dict[str, float]) -> str:
    return f"{_ms(seconds['median'])} ({_ms(seconds['min'])} to {_ms(seconds['max'])})"


def _memory(row: dict[str, Any], digits: int = 0) -> str:
    whole = " (process)" if row["peak_memory_of"] == "process" else ""
    return f"{row['peak_memory_bytes'] / MIB:,.{digits}f}{whole}"


def _share(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
