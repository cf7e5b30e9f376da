"""The published CASCADE runs in the form of `results.json`, as far as their report gives figures."""

from __future__ import annotations

from typing import Any

BASE_PARAMETERS, STAGE_PARAMETERS = 134_515_008, 56_632_896
BASE_PPL = 7.89


def _stage(
    number: int, train: int, val: int, threshold: float, last: float | None, best: float, seconds: float | None
) -> dict[str, Any]:
    return {
        "stage": number,
        "total_layers": 30 + 8 * number,
        "total_parameters": BASE_PARAMETERS + number * STAGE_PARAMETERS,
        "threshold": threshold,
        "train_tokens": train,
        "val_tokens": val,
        "last": {"val_ppl": last},
        "best": {"val_ppl": best},
        "seconds": seconds,
    }


def _run(ratio: float, stages: list[dict[str, Any]], ensemble: list[float], note: str) -> dict[str, Any]:
    return {
        "system": "cascade",
        "name": f"published, {ratio:g}",
        "note": note,
        "config": {"hard_ratio": ratio, "criterion": "cosine"},
        "environment": {"device": "Tesla T4"},
        "data": {"source": "tatsu-lab/alpaca", "fingerprint": "", "train_tokens": 128_000, "val_tokens": 12_800},
        "base": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct", "fingerprint": "", "parameters": BASE_PARAMETERS},
        "stages": stages,
        "ensemble": [
            {"stages": count, "parameters": BASE_PARAMETERS + count * STAGE_PARAMETERS, "val_ppl": ppl}
            for count, ppl in enumerate(ensemble)
        ],
        "seconds": sum(stage["seconds"] for stage in stages) if all(stage["seconds"] for stage in stages) else None,
    }


PUBLISHED_RUNS = [
    _run(
        0.6,
        [
            _stage(1, 76_800, 7_680, 0.1234, 155.41, 151.90, 389.5),
            _stage(2, 46_080, 4_608, 0.3492, 115.91, 102.45, 233.8),
            _stage(3, 27_648, 2_765, 0.3730, 48.14, 45.72, 93.8),
            _stage(4, 16_589, 1_659, 0.2975, 19.54, 19.05, 84.6),
            _stage(5, 9_953, 995, 0.1982, 11.91, 11.54, 51.0),
        ],
        [BASE_PPL, 41.83, 51.06, 54.92, 56.61, 57.02],
        "",
    ),
    _run(
        0.9,
        [
            _stage(1, 115_200, 11_520, 0.1786, None, 84.43, None),
            _stage(2, 103_680, 10_368, 0.4670, None, 92.65, None),
        ],
        [BASE_PPL],
        "broke off in stage 3 (threshold 0.5187)",
    ),
]
