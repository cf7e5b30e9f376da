"""The table of the criteria: signs, dashes, and what the probe was trained on."""

from __future__ import annotations

import pytest

from newllm_jax.report.criteria import criteria_table, criteria_text

pytestmark = pytest.mark.quick


def row(criterion, loss, gain, hard, easy, cost, target=None):
    return {
        "criterion": criterion, "target": target, "loss_correlation": loss, "gain_correlation": gain, "hard_tokens": 60,
        "hard_ppl": hard, "easy_ppl": easy, "cost": cost,
    }  # fmt: skip


RESULTS = {
    "hard_ratio": 0.6,
    "run": None,
    "base": {"val_ppl": 10.951},
    "data": {"train_chunks": 1000, "val_tokens": 12800},
    "criteria": [
        row("cosine", -0.0912, None, 12.5, 9.0, 0.0),
        row("probe", 0.6, None, 27.0, 3.0, 0.000274, "loss"),
        row("oracle", 1.0, None, 45.0, None, None),
    ],
}


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_line_for_each_criterion():
    header, _, *rows = cells(criteria_table(RESULTS))
    assert header[3] == "PPL of the hard 60%"
    assert rows == [
        ["cosine", "-0.09", "-", "12.50", "9.00", "0.0000", "of embedding and last hidden state"],
        ["probe", "+0.60", "-", "27.00", "3.00", "0.0003", "trained to predict the loss, on 1,000 chunks"],
        ["oracle", "+1.00", "-", "45.00", "-", "-", "the loss itself"],
    ]


def test_the_text_tells_tokens_and_run():
    assert "Over 12,800 validation tokens, on which the base has PPL 10.95." in criteria_text(RESULTS)
    assert "gain is" not in criteria_text(RESULTS)
    with_run = {**RESULTS, "run": {"name": "plus-1", "mean_gain": 0.1234}}
    assert "hard path of plus-1: +0.1234 nats on average" in criteria_text(with_run)
