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

OWN = {"weights": "own", "learning_rate": 1e-4}
ABLATION = {  # each differs from the recipe of re-entry in one choice
    "recipe": {},
    "entropy": {"criterion": "entropy"},
    "cosine": {"criterion": "cosine"},
    "trained-on-hard": {"trained_on": "hard"},
    "tokens": {"context": "token"},
    "own-weights": OWN,
    "own-head": {**OWN, "head": "own"},
    "random-start": {**OWN, "start": "random"},
    "last-hidden-state": {**OWN, "start": "random", "entry_layer": None},
    "mixes": {"prediction": "mixes"},
    "entry0": {"entry_layer": 0},
    "entry15": {"entry_layer": 15},
    "entry22": {"entry_layer": 22},
    "entry30": {"entry_layer": 30},
}

TABLES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "search-reentry": (REENTRY, {
        **{f"reentry-lr{rate}": {"learning_rate": float(rate)} for rate in ("5e-4", "1e-3", "2e-3", "4e-3")},
        "reentry-batch8": {"batch_size": 8},
        "reentry-batch32": {"batch_size": 32, "learning_rate": 2e-3},
        "reentry-rank8": {"rank": 8},
    }),
    "ablation": (REENTRY, ABLATION),
    "search-skip": ({**SKIP, "hard_ratio": 0.3, "short_head": 12288}, {
        "skip14-18": {"skipped_layers": [14, 18]},
        "skip14-16": {"skipped_layers": [14, 16]},
        "skip14-20": {"skipped_layers": [14, 20]},
        "skip14-18-short8192": {"skipped_layers": [14, 18], "short_head": 8192, "short_rank": 128},
        "skip14-18-short16384": {"skipped_layers": [14, 18], "short_head": 16384},
        "skip14-18-lr5e-4": {"skipped_layers": [14, 18], "learning_rate": 5e-4},
        "skip14-18-lr2e-3": {"skipped_layers": [14, 18], "learning_rate": 2e-3},
        "skip14-18-share0.5": {"skipped_layers": [14, 18], "hard_ratio": 0.5},
        "skip14-20-head": {"skipped_layers": [14, 20], "short_head": 0},
        "skip14-22-head": {"skipped_layers": [14, 22], "short_head": 0},
        "skip12-20": {"skipped_layers": [12, 20]},
    }),
}  # fmt: skip
