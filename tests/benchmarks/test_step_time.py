"""The command of predictions: what it reads, writes and refuses."""

from __future__ import annotations

import json

import pytest

from benchmarks import step_time
from benchmarks.harness.scaling import StepTime
from newllm_jax.errors import InputError

TRUE = StepTime(fixed=2e-3, example=1e-3, byte=1 / 40e9)
SIZE = 400_000_000


def rows(work="lora", devices=(1, 2), batches=(8, 16, 32)):
    return [
        {
            "work": work, "devices": count, "batch": batch, "seconds_per_update": TRUE.seconds(count, batch, SIZE),
            "allreduce_bytes": SIZE, "samples": [0.1],
        }
        for count in devices for batch in batches
    ]  # fmt: skip


@pytest.fixture
def predict(tmp_path):
    """Runs the command on some rows, each half of them in a file of its own; what it wrote."""

    def run(measured, *options):
        output, sources = tmp_path / "step-time.json", [tmp_path / "devices-h200.json", tmp_path / "more.json"]
        for source, rows in zip(sources, (measured[::2], measured[1::2]), strict=True):
            source.write_text(json.dumps({"environment": {"device": "NVIDIA H200"}, "rows": rows}))
        step_time.main(["--measured", *map(str, sources), "--output", str(output), *options])
        return json.loads(output.read_text())

    return run


def entries(results, work="lora"):
    return {
        (entry["way"].endswith("a device"), entry["devices"], entry.get("network") == "between hosts"): entry
        for entry in results["works"][work]["predictions"]
    }


def test_predictions_are_those_of_the_model(predict, capsys):
    failed = {"work": "lora", "devices": 2, "batch": 64, "error": "out of memory"}
    results = predict([*rows(), failed, *rows("sweep", batches=(16,))])
    assert (results["benchmark"], results["measured"], results["device"]) == (
        "step_time", "devices-h200.json, more.json", "NVIDIA H200",
    )  # fmt: skip
    assert results["command"].startswith("python -m benchmarks.step_time --measured ")
    found = results["works"]["lora"]
    assert found["model"]["bandwidth"] == pytest.approx(40e9)
    assert found["error_percent"]["largest"] < 1e-6 > found["left_out_error_percent"]["largest"]
    assert results["works"]["sweep"]["left_out_error_percent"] is None  # two rows, two parameters

    told = entries(results)
    assert len(told) == len(found["predictions"]) and told.keys() == {
        (False, 8, False), (False, 64, False), (False, 512, False),  # 32 examples are too few for the last two
        (True, 8, False), (True, 64, False), (True, 64, True), (True, 512, False), (True, 512, True),
    }  # fmt: skip
    # 8 devices: 4 examples each, twice 7/8 of 10 ms, or three latencies of 10 ms
    strong = told[False, 8, False]
    assert strong["batch"] == 32
    assert strong["seconds"] == pytest.approx({"least": 6e-3 + 17.5e-3, "most": 6e-3 + 30e-3})
    assert strong["speedup"] == pytest.approx({"least": 34 / 36, "most": 34 / 23.5})
    assert told[False, 64, False]["error"] == "fewer examples than devices"
    # 64 devices: 32 examples each, 8 hosts: twice 7/8 of 8 ms and three times 20 us more
    weak, linked = told[True, 64, True], told[True, 64, False]
    assert weak["batch"] == 2048
    assert weak["seconds"]["least"] == pytest.approx(34e-3 + 17.5e-3 + 14e-3 + 60e-6)
    assert linked["seconds"] == pytest.approx({"least": 34e-3 + 20e-3 * 63 / 64, "most": 34e-3 + 60e-3})
    assert weak["speedup"]["most"] == pytest.approx(64 * 34 / (34 + 17.5 + 14.06))
    assert (strong["extrapolated"], told[True, 8, False]["extrapolated"]) == (False, False)
    assert entries(predict(rows(batches=(16, 32))))[False, 8, False]["extrapolated"] is True
    assert "LoRA on the base" in capsys.readouterr().out


def test_what_is_assumed_of_the_network_is_an_option(predict):
    slower = entries(predict(rows(), "--host_bandwidth", "25e9", "--host_latency", "1e-3", "--host_devices", "4"))
    assert slower[True, 8, True]["seconds"]["least"] == pytest.approx(34e-3 + 15e-3 + 16e-3 + 1e-3)  # two hosts
    assert slower[True, 8, False]["seconds"]["least"] == pytest.approx(34e-3 + 17.5e-3)


def test_more_devices_than_the_model_has_seen_are_checked(predict, capsys):
    slow = rows(devices=(4,), batches=(16, 32))
    slow[0]["seconds_per_update"] *= 2
    found = predict([*rows(), *slow], "--fit_devices", "2")["works"]["lora"]
    assert len(found["rows"]) == 6 and found["error_percent"]["largest"] < 1e-6
    # 4 devices: 4 and 8 examples each, twice 3/4 of 10 ms, or two latencies of 10 ms
    assert [check["predicted_seconds"] for check in found["checks"]] == [
        pytest.approx({"least": 21e-3, "most": 26e-3}), pytest.approx({"least": 25e-3, "most": 30e-3}),
    ]  # fmt: skip
    assert [check["seconds"] for check in found["checks"]] == pytest.approx([42e-3, 25e-3])
    told = " ".join(capsys.readouterr().out.split())
    assert "| 21 to 26 | 42 | -50.0% to -38.1% |" in told
    assert predict([*rows(), *slow])["works"]["lora"]["checks"] == []


def test_bad_input_is_a_line(predict):
    incomplete = rows()
    del incomplete[2]["allreduce_bytes"]
    refused = {
        "a row has no 'allreduce_bytes'": incomplete, "has no rows": [], "no row of one device": rows(devices=(2,)),
    }  # fmt: skip
    for words, measured in refused.items():
        with pytest.raises(InputError, match=words):
            predict(measured)
    with pytest.raises(InputError, match="host_bandwidth"):
        predict(rows(), "--host_bandwidth", "0")
    with pytest.raises(InputError, match="fit_devices"):
        predict(rows(devices=(2, 4)), "--fit_devices", "1")
    with pytest.raises(InputError, match="absent.json"):
        step_time.main(["--measured", "absent.json"])


def test_the_default_file_is_named(capsys):
    program = step_time.options().parse([])
    assert program.output_file() == step_time.FILE and step_time.FILE.name == "step-time.json"
    assert "docs/results/benchmarks/step-time.json" in program.parser.format_help().replace("\n", "").replace(" ", "")
