"""The program of the ablation: what each variant is, and what its file says."""

from __future__ import annotations

import json
import sys

from benchmarks import signal
from benchmarks.harness.program import Program


def test_variants_differ_in_nothing_but_what_they_name(tmp_path, monkeypatch, capsys):
    tasks = []

    def measured(self, function, task, what, **_):
        if function.endswith("machine:measure"):
            return {"environment": {"platform": "gpu", "slug": "h100", "device": "NVIDIA H100"}}
        assert function == "benchmarks.subjects.signal:measure"
        tasks.append(task)
        epoch = {"epoch": 0, "val_ppl": 1000.0, "signal": [1.0, 0.5], "gradient": [0.2, 1.0]}
        return {"precision": "bf16", "epochs": [epoch]}

    monkeypatch.setattr(Program, "measure", measured)
    output = tmp_path / "signal-h100.json"
    argv = ["--dataset", "builtin", "--epochs", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *argv])
    signal.main(argv)

    written = json.loads(output.read_text())
    assert list(written["variants"]) == ["normal", "he", "he+residual"]
    assert (written["benchmark"], written["config"], written["texts"]) == ("signal", "advanced", 128)
    assert written["variants"]["he"]["epochs"][0]["signal"] == [1.0, 0.5]
    configs = [task["config"] for task in tasks]
    kinds = [(config.pop("initialization"), config.pop("cell")) for config in configs]
    assert kinds == [("normal", "plain"), ("he", "plain"), ("he", "residual")]
    assert configs[0] == configs[1] == configs[2]
    assert (configs[0]["dataset"], configs[0]["num_layers"], configs[0]["num_epochs"]) == ("builtin", 12, 50)
    assert all((task["epochs"], task["texts"]) == (3, 128) for task in tasks)
    assert "signal, layer 2 / layer 1" in capsys.readouterr().out
    assert signal.options().default_folder.as_posix().endswith("docs/results/ablation")
