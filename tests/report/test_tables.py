"""Tables that line up, and the report of a run."""

from __future__ import annotations

import json

import pytest

from newllm_jax.report.newllm import newllm_report
from newllm_jax.report.tables import markdown_table, number


def entry(epoch, val_ppl):
    return {
        "epoch": epoch, "train_loss": 3.25, "val_loss": 3.0, "val_ppl": val_ppl, "val_accuracy": 0.314,
        "learning_rate": 1e-4, "clip_norm": 0.5, "grad_norm": 1.0, "tokens_per_second": 12345.6, "seconds": 9.87,
    }  # fmt: skip


@pytest.fixture
def results():
    return {
        "name": "mine-20300101-000000",
        "config": {
            "num_layers": 6, "hidden_dim": 512, "context_dim": 256, "embed_dim": 256, "batch_size": 32,
            "learning_rate": 1e-4, "schedule": "constant", "seed": 3,
        },
        "command": "python train.py --config mine",
        "environment": {"device": "cpu", "platform": "cpu", "precision": "fp32", "jax": "0.7.2", "flax": "0.11.2"},
        "data": {
            "source": "Salesforce/wikitext (wikitext-2-raw-v1)", "asked": "Salesforce/wikitext", "fallback": "",
            "train_sequences": 51_026, "validation_sequences": 5_272, "test_sequences": 5_920,
            "vocabulary_size": 1000, "steps_per_epoch": 1_595,
        },
        "parameters": 2_739_432,
        "epochs": [entry(1, 48.612), entry(2, 23.344)],
        "stopped": "after epoch 2, the last of num_epochs (raise it to continue)",
        "best": {"epoch": 2, "val_loss": 3.1503, "val_ppl": 23.344},
        "test": {"loss": 3.2, "ppl": 24.533, "accuracy": 0.33},
        "seconds": 61.4,
        "peak_memory_bytes": 3 * 2**29,
    }  # fmt: skip


def test_columns_line_up():
    table = markdown_table(["epoch", "loss"], [["1", "3.25"], ["10", "12.5000"]])
    assert table == (
        "| epoch |    loss |\n"
        "| ----- | ------: |\n"
        "| 1     |    3.25 |\n"
        "| 10    | 12.5000 |"
    )  # fmt: skip
    assert markdown_table(["a"], []) == "| a   |\n| --- |"


def test_numbers():
    assert number(23.344) == "23.34"
    assert number(23.344, 3) == "23.344"
    assert number(None) == "-"


def test_the_report_says_what_happened(results):
    report = newllm_report(results)
    assert report.startswith(
        "# New-LLM: mine-20300101-000000\n\nBest validation perplexity **23.34** (loss 3.1503) after "
    )
    assert (
        "after epoch 2 of 2; on the test split, with the same parameters, **24.53** (loss 3.2000, accuracy 33.0%)."
        in report
    )
    for row in (
        "```sh\npython train.py --config mine\n```",
        "51,026 / 5,272 / 5,920 sequences (train / validation / test), vocabulary 1,000 |",
        "| model | 2,739,432 parameters: 6 layers of 512, context vector of 256, embedding of 256 |",
        "| training | 1,595 updates an epoch at batch 32, learning rate 0.0001 (constant), seed 3 |",
        "| time, memory | 61 s, 1.50 GiB at most |",
        "| 1     |     3.2500 |   3.0000 |   48.61 |        31.4% | 0.0001 |  0.5 |   12,346 |     9.9 |",
    ):  # fmt: skip
        assert row in report
    assert "Not the data" not in report


def test_the_report_of_other_data_says_so_first(results):
    results["data"] |= {"source": "builtin", "fallback": "the Hub does not answer"}
    report = newllm_report(results)
    warning = report.index(
        "**Not the data that was asked for.** Salesforce/wikitext was not available (the Hub does not answer)"
    )
    assert warning < report.index("Best validation perplexity")
    assert "must not be compared with published ones" in report


def test_a_perplexity_that_overflowed(results):
    results["epochs"][0]["val_ppl"] = None
    assert "|       - |" in newllm_report(results)


def test_the_report_of_a_real_run(small_run):
    results = json.loads((small_run / "results.json").read_text())
    assert (small_run / "report.md").read_text() == newllm_report(results)
