"""The tables of several devices: figures and verdicts by hand, and what a file that is not there gives."""

from __future__ import annotations

import json

import pytest

from benchmarks.tables import files
from benchmarks.tables.devices import DEVICE_TABLES, model_table, prediction_table, speedup_table
from benchmarks.tables.pages import PAGES, TABLES, render

pytestmark = pytest.mark.quick


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def row(work, devices, batch, seconds, **more):
    spread = {"update_seconds": {"min": seconds, "max": seconds}}
    return {"work": work, "devices": devices, "batch": batch, "seconds_per_update": seconds, **spread, **more}


def test_speedups_and_targets():
    rows = [
        row("other", 1, 8, 0.1), row("other", 2, 8, 0.05), row("alone", 1, 8, 0.1),
        row("advanced", 1, 512, 0.01), row("advanced", 2, 512, 0.008),
        row("advanced", 1, 4096, 0.05, update_seconds={"min": 0.049, "max": 0.06}), row("advanced", 2, 4096, 0.0314),
        row("advanced", 1, 8192, 0.1), row("advanced", 2, 8192, 0.05),
        row("lora", 1, 16, 0.02), row("lora", 2, 16, 0.018),
        row("lora", 1, 64, 0.07), row("lora", 2, 64, 0.04),
        row("lora", 1, 128, 0.14), {"work": "lora", "devices": 2, "batch": 128, "error": "out of memory"},
    ]  # fmt: skip
    header, _, *lines = cells(speedup_table({"rows": rows}))
    assert header == [
        "work", "batch on all devices", "1 device, ms (min to max)", "2 devices", "target for 2 devices"
    ]  # fmt: skip
    assert lines == [
        ["LoRA on the base", "16", "20 (20 to 20)", "18 (18 to 18): 1.11x", "-"],
        ["LoRA on the base", "64", "70 (70 to 70)", "40 (40 to 40): 1.75x", "1.75x: reached"],
        ["LoRA on the base", "128", "140 (140 to 140)", "out of memory", "-"],
        ["New-LLM `advanced`", "512", "10 (10 to 10)", "8 (8 to 8): 1.25x", "-"],
        ["New-LLM `advanced`", "4,096", "50 (49 to 60)", "31.4 (31.4 to 31.4): 1.59x", "1.6x: missed"],
        ["New-LLM `advanced`", "8,192", "100 (100 to 100)", "50 (50 to 50): 2.00x", "-"],
        ["alone", "8", "100 (100 to 100)", "-", "-"],
        ["other", "8", "100 (100 to 100)", "50 (50 to 50): 2.00x", "-"],
    ]


def test_the_target_is_that_of_the_most_devices():
    rows = [
        row("cascade", 1, 64, 0.4), row("cascade", 2, 64, 0.2), row("cascade", 4, 64, 0.1),
        row("cascade", 1, 128, 0.8), row("cascade", 2, 128, 0.4), row("cascade", 4, 128, 0.25),
        row("cascade", 1, 256, 1.6), row("cascade", 2, 256, 0.8),
        row("lora", 1, 64, 0.4), row("lora", 4, 64, 0.1),
    ]  # fmt: skip
    header, _, *lines = cells(speedup_table({"rows": rows}))
    assert header[-2:] == ["4 devices", "target for 4 devices"]
    assert [line[-2:] for line in lines] == [
        ["100 (100 to 100): 4.00x", "-"], ["250 (250 to 250): 3.20x", "3.3x: missed"], ["-", "-"],
        ["100 (100 to 100): 4.00x", "-"],
    ]  # fmt: skip


STEP_TIME = {
    "network": {"host_devices": 8, "bandwidth": 50e9, "latency": 20e-6},
    "works": {
        "lora": {
            "model": {
                "terms": ["fixed", "example", "byte"], "floor_seconds": 0.0, "fixed_seconds": 2e-3,
                "example_seconds": 1e-3, "latency_seconds": 0.0, "bandwidth": 40e9,
            },
            "allreduce_bytes": 20 * 2**20, "rows": [{}] * 6,
            "error_percent": {"root_mean_square": 1.234, "largest": 2.5}, "left_out_error_percent": None,
            "predictions": [
                {
                    "way": "the same batch", "devices": 8, "batch": 4, "error": "fewer examples than devices",
                },
                {
                    "way": "the same batch a device", "devices": 512, "batch": 16384, "network": "between hosts",
                    "seconds": {"least": 0.0341, "most": 0.05}, "speedup": {"least": 256.0, "most": 384.0},
                    "extrapolated": True,
                },
            ],
        },
        "sweep": {
            "model": {
                "terms": ["floor", "byte"], "floor_seconds": 5e-3, "fixed_seconds": 0.0, "example_seconds": 0.0,
                "latency_seconds": 0.0, "bandwidth": None,
            },
            "allreduce_bytes": 0, "rows": [{}] * 2, "error_percent": {"root_mean_square": 0.0, "largest": 0.0},
            "left_out_error_percent": {"root_mean_square": 3.0, "largest": 4.0},
            "predictions": [{
                "way": "the same batch", "devices": 8, "batch": 16, "network": "within a host",
                "seconds": {"least": 0.01, "most": 0.01001}, "speedup": {"least": 7.9, "most": 7.9},
                "extrapolated": False,
            }],
        },
    },
}  # fmt: skip


def test_models_and_predictions():
    assert cells(model_table(STEP_TIME))[2:] == [
        ["LoRA on the base", "2", "-", "1,000", "20.0", "40", "-", "6", "1.2%, 2.5%", "-"],
        ["sweep of New-LLM (the batch: members)", "-", "5", "-", "0.0", "no effect seen", "-", "2", "0.0%, 0.0%",
         "3.0%, 4.0%"],
    ]  # fmt: skip
    assert cells(prediction_table(STEP_TIME))[2:] == [
        ["LoRA on the base", "the same batch", "8", "4", "-", "fewer examples than devices", "-", "-"],
        ["LoRA on the base", "the same batch a device", "512", "16,384", "hosts of 8, 50 GB/s between them",
         "34.1 to 50 *", "256 to 384x", "50 to 75%"],
        ["sweep of New-LLM (the batch: members)", "the same batch", "8", "16", "all linked as within a host", "10",
         "7.9x", "99%"],
    ]  # fmt: skip


def test_the_page_waits_for_the_files(tmp_path, monkeypatch):
    (page,) = (page for page in PAGES if page.name == "devices.md")
    assert all(TABLES[name] is table and f"<!-- table: {name} -->" in page.read_text()
               for name, table in DEVICE_TABLES.items())  # fmt: skip
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    assert render(page.read_text()).count("Not run yet.") == 7
    measured = {"rows": [row("lora", 1, 64, 0.07), row("lora", 2, 64, 0.04)]}
    used = {"rows": [{"work": "lora", "mesh": "data=2", "planned_bytes": 3 * 2**30, "peak_bytes": 2**32}]}

    def write(**contents):
        for name, content in contents.items():
            (tmp_path / "benchmarks" / f"{name.replace('__', '-')}.json").write_text(json.dumps(content))

    write(devices__h200=measured, step__time=STEP_TIME, device_memory__h200=used)
    text = render(page.read_text())
    assert text.count("Not run yet.") == 3 and "1.75x: reached" in text and "no effect seen" in text and "384x" in text
    assert "-25.0%" in text
    four = {"rows": [row("sweep", 1, 64, 0.07), row("sweep", 4, 64, 0.0175)]}
    check = {"devices": 4, "batch": 64, "seconds": 0.02, "predicted_seconds": {"least": 0.019, "most": 0.022}}
    checked = {"works": {"lora": {"checks": [check]}}}
    write(devices__four__chunks__h200=measured, devices__four__sweep__h200=four, step__time__four=checked)
    text = render(page.read_text())
    assert text.count("Not run yet.") == 1  # memory; of speedups there are two files of three, in one table
    assert "3.8x: reached" in text and "-5.0% to +10.0%" in text
