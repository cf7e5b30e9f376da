"""The designs of CASCADE that `benchmarks.designs` trains: tables of names and settings."""

from __future__ import annotations

from typing import Any

COMMON = {
    "num_stages": 1, "batch_size": 16, "learning_rate": 1e-3, "num_epochs": 2, "patience": 1, "stage_weights": "best",
    "train_chunks": 1000, "validation_chunks": 100, "test_chunks": 300, "calibration_chunks": 100, "whole_rows": True,
}  # fmt: skip
REENTRY = {
    **COMMON, "entry_layer": 8, "context": "sequence", "start": "base", "weights": "lora", "head": "base",
    "trained_on": "all", "criterion": "probe", "flops": 1.6,
}  # fmt: skip
SKIP = {**COMMON, "skipped_layers": [14, 22], "weights": "lora", "criterion": "probe", "flops": 0.85}

TABLES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "search-reentry": (REENTRY, {
        **{f"reentry-lr{rate}": {"learning_rate": float(rate)} for rate in ("5e-4", "1e-3", "2e-3", "4e-3")},
        "reentry-batch8": {"batch_size": 8},
        "reentry-batch32": {"batch_size": 32, "learning_rate": 2e-3},
        "reentry-rank8": {"rank": 8},
        "reentry-rank26": {"rank": 26},
        "reentry-n6": {"entry_layer": 6},
        "reentry-n10": {"entry_layer": 10},
        "reentry-mixes": {"prediction": "mixes"},
        "reentry-entropy": {"criterion": "entropy"},
    }),
    "search-skip": (SKIP, {
        **{f"skip14-22-lr{rate}": {"learning_rate": float(rate)} for rate in ("5e-4", "1e-3", "2e-3")},
        "skip14-20": {"skipped_layers": [14, 20]},
        "skip12-22": {"skipped_layers": [12, 22]},
        "skip12-24": {"skipped_layers": [12, 24]},
        "skip10-22": {"skipped_layers": [10, 22]},
        "skip14-24": {"skipped_layers": [14, 24]},
        "skip14-22-map": {"skip_rank": 64},
        "skip14-22-epochs4": {"num_epochs": 4, "patience": 2},
    }),
}  # fmt: skip
