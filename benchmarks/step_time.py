"""What an update takes on 8, 64 and 512 devices, predicted from few: `python -m benchmarks.step_time`.

Reads what `python -m benchmarks.devices` measured, fits the model of `benchmarks/harness/scaling.py` to each kind of
work, says how far it is from what was measured, and predicts. Nothing is measured here. With `--fit_devices 2` the
model sees the measurements of one and two devices only, and what it says of the others stands beside what they took.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.program import RESULTS, ROOT, SCHEMA_VERSION, Program, positive, run_program
from benchmarks.harness.scaling import Network, Row, StepTime, fit, left_out_errors
from benchmarks.tables.devices import check_table, model_table, prediction_table
from newllm_jax.errors import InputError
from newllm_jax.files import read_json

PREDICTED = (8, 64, 512)
MEASURED = RESULTS / "devices-h200.json"
FILE = RESULTS / "step-time.json"
BATCHES = "the same batch", "the same batch a device"  # ways to use more devices


def positive_number(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


positive_number.__name__ = "positive number"  # argparse names it in its complaint


def options() -> Program:
    """The program with its options; nothing is parsed yet."""
    program = Program("step_time", "Predict the time of an update on many devices.", file=FILE)
    add = program.parser.add_argument
    default = MEASURED.relative_to(ROOT).as_posix()
    add("--measured", metavar="FILE", nargs="+", default=[default], help="files of python -m benchmarks.devices "
        f"(default {default})")  # fmt: skip
    add("--fit_devices", type=positive, help="fit to measurements of up to so many devices, and compare the prediction "
        "with those of more (default: fit to all)")  # fmt: skip
    add("--host_devices", type=positive, default=8, help="devices in a host (default %(default)s)")
    add("--host_bandwidth", type=positive_number, default=50e9, help="bytes a second that a host is assumed to send to "
        "other hosts, all its devices together (default %(default)g: 400 Gbit/s)")  # fmt: skip
    add("--host_latency", type=positive_number, default=20e-6, help="seconds assumed for each doubling of the hosts "
        "(default %(default)g)")  # fmt: skip
    return program


def main(argv: Sequence[str]) -> None:
    """Fits and predicts, writes and prints both. Raises InputError."""
    program = options().parse(argv)
    typed = program.arguments
    paths = [path if path.is_absolute() or path.exists() else ROOT / path for path in map(Path, typed.measured)]
    measured = [read_json(path) for path in paths]
    network = Network(typed.host_devices, typed.host_bandwidth, typed.host_latency)
    program.results = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": "step_time",
        "command": shlex.join([*program.parser.prog.split(), *argv]),
        "measured": ", ".join(path.name for path in paths),
        "device": measured[0].get("environment", {}).get("device"),
        "network": vars(network),
        "works": {
            work: describe(rows, network, typed.fit_devices or math.inf)
            for work, rows in rows_by_work([row for each in measured for row in each.get("rows", [])]).items()
        },
    }
    tables = [model_table, prediction_table, *([check_table] if typed.fit_devices else [])]
    with program:
        program.write("\n\n".join(table(program.results) for table in tables))


def rows_by_work(measured: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """The measured rows of each kind of work, but those that failed. Raises InputError."""
    works: dict[str, list[Row]] = {}
    for row in measured:
        if "error" in row:
            continue
        try:
            numbers = row["devices"], row["batch"], row["seconds_per_update"], row["allreduce_bytes"]
            works.setdefault(row["work"], []).append(Row(*numbers))
        except KeyError as missing:
            raise InputError(f"measured: a row has no {missing}") from missing
    if not works:
        raise InputError("measured: has no rows")
    return works


def describe(measured: Sequence[Row], network: Network, most_devices: float) -> dict[str, Any]:
    """The model of one kind of work, its errors on the rows, and what it predicts.

    Args:
      most_devices: in a row that the model is fitted to.
    """
    rows = [row for row in measured if row.devices <= most_devices]
    if not rows:
        raise InputError(f"fit_devices: a kind of work was measured on more than {most_devices} devices only")
    model, left_out = fit(rows), left_out_errors(rows)
    errors = [model.error(row) for row in rows]
    return {
        "model": {
            "terms": model.terms,
            **{f"{name}_seconds": getattr(model, name) for name in ("floor", "fixed", "example", "latency")},
            "bandwidth": 1 / model.byte if model.byte else None,
        },
        "allreduce_bytes": rows[-1].bytes,
        "rows": [
            {**vars(row), "error_percent": 100 * error, "left_out_error_percent": None if left is None else 100 * left}
            for row, error, left in zip(rows, errors, left_out, strict=True)
        ],
        "error_percent": summary(errors),
        "left_out_error_percent": summary([error for error in left_out if error is not None]),
        "predictions": predictions(model, rows, network),
        "checks": [check(model, row) for row in measured if row.devices > most_devices],
    }


def check(model: StepTime, row: Row) -> dict[str, Any]:
    """What a model that was fitted without a row says of it, from one of its readings to the other."""
    seconds = [reading.seconds(row.devices, row.batch, row.bytes) for reading in model.readings(row.bytes)]
    return {**vars(row), "predicted_seconds": {"least": min(seconds), "most": max(seconds)}}


def summary(errors: Sequence[float]) -> dict[str, float] | None:
    """The root of the mean square and the largest of some relative errors, in percent; None where there are none."""
    if not errors:
        return None
    root = math.sqrt(sum(error**2 for error in errors) / len(errors))
    return {"root_mean_square": 100 * root, "largest": 100 * max(map(abs, errors))}


def predictions(model: StepTime, rows: Sequence[Row], network: Network) -> list[dict[str, Any]]:
    """An entry for each way to use more devices, their number, and the network between them.

    The batch, or the batch a device, is the largest that was measured on one device.
    """
    alone = max((row for row in rows if row.devices == 1), key=lambda row: row.batch, default=None)
    if alone is None:
        raise InputError("measured: a kind of work has no row of one device")
    one_host = Network(max(PREDICTED), network.bandwidth, network.latency)  # all devices linked as those within a host
    least_examples, found = min(row.examples for row in rows), []
    for way in BATCHES:
        for devices in PREDICTED:
            batch = alone.batch * (1 if way == BATCHES[0] else devices)
            entry = {"way": way, "devices": devices, "batch": batch}
            if batch < devices:
                found.append({**entry, "error": "fewer examples than devices"})
                continue
            networks = {"within a host": one_host, "between hosts": network}
            for name, links in networks.items():
                if name == "between hosts" and devices <= network.host_devices:
                    continue
                readings = model.readings(alone.bytes)
                seconds = [links.seconds(reading, devices, batch, alone.bytes) for reading in readings]
                rate = model.seconds(1, alone.batch, alone.bytes) / alone.batch * batch
                found.append({
                    **entry,
                    "network": name,
                    "seconds": {"least": min(seconds), "most": max(seconds)},
                    "speedup": {"least": rate / max(seconds), "most": rate / min(seconds)},
                    "extrapolated": batch / devices < least_examples,
                })  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(run_program(main))
