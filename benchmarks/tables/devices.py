"""The tables of several devices: measured times, their model, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import files
from benchmarks.tables.experiments import NONE_YET
from newllm_jax.report.tables import markdown_table


@dataclass(frozen=True)
class Target:
    """How many times as fast several devices shall be as one, with the same batch on all devices together.

    Attributes:
      title: of the work.
      speedups: by the number of devices.
      batch: the one that it is for; None: the largest that was measured.
    """

    title: str
    speedups: Mapping[int, float]
    batch: int | None = None


TARGETS = {  # by the name of the work in the measurements
    "cascade": Target("CASCADE, a stage that sees the sequence", {2: 1.75, 4: 3.3, 8: 6.0}),
    "lora": Target("LoRA on the base", {2: 1.75}),
    "finetune": Target("full fine-tuning", {2: 1.75, 4: 3.3, 8: 6.0}),
    "wikitext2": Target("New-LLM `wikitext2`", {2: 1.7, 4: 3.2}),
    "sweep": Target("sweep of New-LLM (the batch: members)", {2: 1.9, 4: 3.8}),
    "advanced": Target("New-LLM `advanced`", {2: 1.6}, batch=4096),
}
MIB, GIB = 2**20, 2**30
TITLES = {"small_sweep": "sweep of small members (`baseline`)"}  # of work without a target


def speedup_table(results: dict[str, Any]) -> str:
    """Times by number of devices for each work and batch, and whether the most devices reach their target."""
    groups: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["work"], row["batch"]), {})[row["devices"]] = row
    counts = sorted({row["devices"] for row in results["rows"]} - {1})
    rows, most = [], max(counts, default=1)
    for work, batch in sorted(groups, key=lambda key: (_place(key[0]), key)):
        group = groups[work, batch]
        one = _seconds(group.get(1))
        cells = [_title(work), f"{batch:,}", _measured(group.get(1))]
        for count in counts:
            faster = one / several if (several := _seconds(group.get(count))) and one else None
            cells.append(_measured(group.get(count)) + (f": {faster:.2f}x" if faster else ""))
        largest = max((other for name, other in groups if name == work and _both(groups[name, other], most)), default=0)
        rows.append([*cells, _verdict(work, batch, group, largest, most)])
    header = ["work", "batch on all devices", "1 device, ms (min to max)", *(f"{count} devices" for count in counts),
              f"target for {most} devices"]  # fmt: skip
    return markdown_table(header, rows)


def memory_table(results: dict[str, Any]) -> str:
    """What was planned of each device's memory, and what a run took."""
    rows = []
    for row in results["rows"]:
        if "error" in row:
            rows.append([row["work"], row["mesh"], "-", row["error"], "-"])
            continue
        planned, peak = row["planned_bytes"], row["peak_bytes"]
        rows.append([row["work"], f"`{row['mesh']}`", f"{planned / GIB:.2f}", f"{peak / GIB:.2f}",
                     f"{planned / peak - 1:+.1%}"])  # fmt: skip
    return markdown_table(["work", "mesh", "planned, GiB", "used, GiB", "plan against use"], rows)


def model_table(results: dict[str, Any]) -> str:
    """The parameters of the model of each work, and its errors; a dash where the measurements identify none."""
    header = ["work", "fixed, ms", "floor, ms", "an example, us", "all-reduce, MiB", "bandwidth, GB/s",
              "latency, us", "rows", "error on them: root mean square, largest", "on a row left out"]  # fmt: skip
    rows = []
    for work, found in results["works"].items():
        model, terms = found["model"], found["model"]["terms"]
        rows.append([
            _title(work),
            *(
                _significant(scale * model[f"{term}_seconds"], 3) if term in terms else "-"
                for term, scale in (("fixed", 1e3), ("floor", 1e3), ("example", 1e6))
            ),
            f"{found['allreduce_bytes'] / MIB:,.1f}", _bandwidth(model["bandwidth"], terms),
            _significant(1e6 * model["latency_seconds"], 3) if "latency" in terms else "-", str(len(found["rows"])),
            _errors(found["error_percent"]), _errors(found["left_out_error_percent"]),
        ])  # fmt: skip
    return markdown_table(header, rows)


def prediction_table(results: dict[str, Any]) -> str:
    """Predicted times and speedups; a star where a device has fewer examples than in any measurement."""
    network = results["network"]
    names = {
        "within a host": "all linked as within a host",
        "between hosts": f"hosts of {network['host_devices']}, {network['bandwidth'] / 1e9:g} GB/s between them",
    }
    rows = []
    for work, found in results["works"].items():
        for entry in found["predictions"]:
            cells = [_title(work), entry["way"], str(entry["devices"]), f"{entry['batch']:,}"]
            if "error" in entry:
                rows.append([*cells, "-", entry["error"], "-", "-"])
                continue
            speedup, star = entry["speedup"], " *" if entry["extrapolated"] else ""
            share = {name: 100 * value / entry["devices"] for name, value in speedup.items()}
            milliseconds = {name: 1e3 * value for name, value in entry["seconds"].items()}
            rows.append([
                *cells, names[entry["network"]], _range(milliseconds, 3) + star, f"{_range(speedup, 3)}x",
                f"{_range(share, 2)}%",
            ])  # fmt: skip
    header = ["work", "what stays", "devices", "batch on all devices", "network", "an update, ms",
              "examples a second, against 1 device", "of ideal"]  # fmt: skip
    return markdown_table(header, rows)


def check_table(results: dict[str, Any]) -> str:
    """What a model predicted for more devices than it was fitted to, beside what was measured on them."""
    rows = []
    for work, found in results["works"].items():
        for row in found["checks"]:
            predicted = {name: 1e3 * seconds for name, seconds in row["predicted_seconds"].items()}
            errors = [seconds / row["seconds"] - 1 for seconds in row["predicted_seconds"].values()]
            told = [f"{error:+.1%}" for error in errors]
            rows.append([
                _title(work), str(row["devices"]), f"{row['batch']:,}", _range(predicted, 3),
                _significant(1e3 * row["seconds"], 3), " to ".join(dict.fromkeys(told)),
            ])  # fmt: skip
    header = ["work", "devices", "batch on all devices", "predicted, ms", "measured, ms", "error of the prediction"]
    return markdown_table(header, rows)


def _bandwidth(value: float | None, terms: list[str]) -> str:
    if value is None:
        return "no effect seen" if "byte" in terms else "-"
    return f"{value / 1e9:.3g}"


def _verdict(work: str, batch: int, group: dict[int, dict[str, Any]], largest: int, devices: int) -> str:
    """The target for so many devices and whether it is reached; a dash where the batch has none."""
    target = TARGETS.get(work)
    speedup = target.speedups.get(devices) if target and batch == (target.batch or largest) else None
    if speedup is None or not _both(group, devices):
        return "-"
    reached = _seconds(group[1]) / _seconds(group[devices]) >= speedup
    return f"{speedup:g}x: {'reached' if reached else 'missed'}"


def _both(group: dict[int, dict[str, Any]], devices: int) -> bool:
    """Whether a batch was measured on one device and on so many."""
    return _seconds(group.get(1)) > 0 and _seconds(group.get(devices)) > 0


def _seconds(row: dict[str, Any] | None) -> float:
    """Of an update; 0 where it was not measured."""
    return row.get("seconds_per_update", 0.0) if row else 0.0


def _measured(row: dict[str, Any] | None) -> str:
    """Milliseconds, with the spread of the samples; what went wrong; a dash."""
    if row is None:
        return "-"
    if "error" in row:
        return row["error"]
    spread = row["update_seconds"]
    return f"{1e3 * row['seconds_per_update']:.3g} ({1e3 * spread['min']:.3g} to {1e3 * spread['max']:.3g})"


def _range(values: dict[str, float], digits: int) -> str:
    """A number, or two where they differ as they are written."""
    least, most = (_significant(values[end], digits) for end in ("least", "most"))
    return least if least == most else f"{least} to {most}"


def _significant(value: float, digits: int) -> str:
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 10 ** (digits - 1) else f"{rounded:g}"


def _errors(errors: dict[str, float] | None) -> str:
    return "-" if errors is None else f"{errors['root_mean_square']:.1f}%, {errors['largest']:.1f}%"


def _title(work: str) -> str:
    return TARGETS[work].title if work in TARGETS else TITLES.get(work, work)


def _place(work: str) -> int:
    """In the order of the targets, what has none behind them."""
    return list(TARGETS).index(work) if work in TARGETS else len(TARGETS)


def _table(names: str, table: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A table of a file of the benchmarks, or of the rows of several, where there are any yet."""

    def make() -> str:
        paths = [path for name in names.split() if (files.RESULTS / (path := f"benchmarks/{name}.json")).exists()]
        if not paths:
            return NONE_YET
        found = [files.load(path) for path in paths]
        return table(found[0] if len(found) == 1 else {"rows": [row for each in found for row in each["rows"]]})

    return make


DEVICE_TABLES: dict[str, Callable[[], str]] = {
    "devices speedup": _table("devices-h200", speedup_table),
    "devices memory": _table("device_memory-h200", memory_table),
    "devices model": _table("step-time", model_table),
    "devices predictions": _table("step-time", prediction_table),
    "devices speedup of four": _table(
        "devices-four-chunks-h200 devices-four-words-h200 devices-four-sweep-h200", speedup_table
    ),
    "devices memory of four": _table("device_memory-four-h200", memory_table),
    "devices checked": _table("step-time-four", check_table),
}
