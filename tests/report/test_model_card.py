"""Model cards: the head that the Hub reads, fallbacks that are told, and texts of a run that are no markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from newllm_jax.records.directory import RunDir
from newllm_jax.report.model_card import model_card
from newllm_jax.sources.weights import DEFAULT_BASE, PACKAGE

RESULTS = Path(__file__).parents[2] / "docs" / "results"
HOSTILE = "a|b`c\n---\nlicense: mit\n# <script>[x](y)"


def results_of(system: str) -> dict:
    """Real results of a system."""
    files = sorted(RESULTS.rglob("*.json"))
    found = (json.loads(file.read_text()) for file in files if f'"system": "{system}"' in file.read_text())
    return next(each for each in found if isinstance(each, dict) and each.get("system") == system)


def card(results: dict, kind: str | None = None, name: str = "mine") -> tuple[dict, str]:
    """The metadata and the text."""
    text = model_card(results, name, RunDir(Path(), {"export": {"kind": kind} if kind else {}}))
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize(
    ("system", "kind", "library"),
    [("new-llm", None, "newllm_jax"), ("cascade", None, "newllm_jax"), ("finetune", "model", "transformers"),
     ("finetune", "adapter", "peft")],
)  # fmt: skip
def test_what_the_hub_reads(system, kind, library):
    results = results_of(system)
    results["data"] |= {"source": "tatsu-lab/alpaca", "fallback": ""}
    if "base" in results:
        results["base"]["source"] = PACKAGE
    head, body = card(results, kind)
    assert (head["library_name"], head["license"]) == (library, "apache-2.0")
    assert (head["datasets"], head.get("base_model")) == (
        ["tatsu-lab/alpaca"],
        DEFAULT_BASE if system != "new-llm" else None,
    )
    assert "Not the data that was asked for" not in body
    assert ("full precision" in body) == (kind == "adapter")


def test_a_fallback_is_told_and_a_local_source_is_no_name_of_the_hub():
    results = results_of("finetune")
    results["data"] |= {"source": "/home/someone/private/rows.jsonl", "asked": "a/b", "fallback": "out of reach"}
    results["base"] |= {"source": "/home/someone/model", "fallback": ""}
    results["config"]["dataset"] = "/home/someone/private/rows.jsonl"
    head, body = card(results, "model")
    assert not head.keys() & {"datasets", "base_model", "license"}
    assert "> **Not the data that was asked for.** `a/b` was not available, so this is `rows.jsonl`." in body
    assert "someone" not in body and "rows.jsonl" in body


@pytest.mark.parametrize("system", ["new-llm", "cascade", "finetune"])
def test_no_text_of_a_run_is_markup(system):
    results = results_of(system)
    kind = "model" if system == "finetune" else None
    head, body = card(results, kind)
    results["name"] = results["environment"]["device"] = results["config"]["dataset"] = HOSTILE
    results["data"] |= {"source": HOSTILE, "asked": HOSTILE, "fallback": HOSTILE}
    hostile_head, hostile_body = card(results, kind, HOSTILE)
    assert {**hostile_head, "datasets": None} == {**head, "datasets": None}

    def structure(text: str) -> list[str]:
        return [line[:2] for line in text.splitlines() if line.startswith(("#", "---", "```", "|"))]

    assert structure(hostile_body) == structure(body)
    outside_code = "".join(hostile_body.replace("\\`", "").split("`")[::2])
    assert "<script>" not in outside_code.replace("\\<script\\>", "")
