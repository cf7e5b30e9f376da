"""What was published: the curves of New-LLM, and the CASCADE runs in the form of `results.json`.

The figures of New-LLM, each with its source, are in `docs/results/published.json`, which a wheel has in this folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_jax.config import NewLLMConfig, load_config
from newllm_jax.errors import InputError
from newllm_jax.files import read_json

FIGURES = Path(__file__).with_name("published.json")
WIKITEXT = ("(wikitext-2-raw-v1)", "(wikitext-2-v1)")  # what a source is called that holds the published texts
# Settings that a run may have as it likes, beside those that resuming may change, and be one of the published training.
FREE = {"seed", "precision", "minimum_gain"}

BASE_PARAMETERS, STAGE_PARAMETERS = 134_515_008, 56_632_896
BASE_PPL = 7.89


@dataclass(frozen=True)
class Curve:
    """A published curve.

    Attributes:
      name: of the configuration.
      device: that it was trained on.
      ppl: validation perplexity by epoch, of the epochs that figures were published of.
    """

    name: str
    device: str
    ppl: dict[int, float]

    @property
    def told(self) -> str:
        """What a reader must know of it."""
        return f"the published curve of `{self.name}` ({self.device}), trained with the same settings on the same texts"


def newllm_figures() -> dict[str, Any]:
    """The published figures of New-LLM by configuration; each has a `value` and a `source`."""
    file = FIGURES if FIGURES.is_file() else Path(__file__).parents[2] / "docs" / "results" / FIGURES.name
    return read_json(file)["newllm"]


def published_curve(results: Mapping[str, Any]) -> Curve | None:
    """The published curve that results may be shown beside: of the same settings and texts. None where there is none.

    Results of other texts (a fallback, a folder of one's own) have none, nor do those of another vocabulary.
    """
    data, system = results.get("data", {}), results.get("system")
    if system != NewLLMConfig.system or data.get("fallback") or not str(data.get("source")).endswith(WIKITEXT):
        return None
    try:
        found = NewLLMConfig.from_dict(results["config"])
    except InputError:  # settings of another version
        return None
    for name, figures in newllm_figures().items():
        published = load_config(name)
        differ = {
            field.name
            for field in dataclasses.fields(published)
            if getattr(found, field.name) != getattr(published, field.name)
        }
        if differ <= FREE | NewLLMConfig.resumable and data.get("vocabulary_size") == published.vocabulary_size:
            by_epoch = {int(epoch): figure["value"] for epoch, figure in figures["val_ppl"].items()}
            return Curve(name, figures["device"], by_epoch)
    return None


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
