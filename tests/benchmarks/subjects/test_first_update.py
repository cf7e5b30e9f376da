"""The run that ends after its first update."""

from __future__ import annotations

import time

from benchmarks.subjects import first_update
from newllm_jax.records.progress import TrainingProgress


def test_ends_after_one_update_and_says_when(options, tmp_path, monkeypatch, only_run):
    monkeypatch.setattr(TrainingProgress, "progress", TrainingProgress.progress)  # given back after the test
    mark, started = tmp_path / "mark", time.time()
    assert first_update.main([str(mark), *options, f"--run_root={tmp_path / 'runs'}"]) == 0
    assert started < float(mark.read_text()) < time.time()
    assert not (only_run(tmp_path / "runs") / "results.json").exists()


def test_a_run_that_ends_before_gives_its_own_exit_code(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainingProgress, "progress", TrainingProgress.progress)
    assert first_update.main([str(tmp_path / "mark"), *options, "--num_layers=0"]) == 2
    assert "num_layers" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
