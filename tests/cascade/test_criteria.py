"""The quality of the criteria: ranks as by hand, rows as the run's own functions give them, a run's gains."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from newllm_jax.cascade.criteria import (
    SINGLE_PASS,
    BaseTokens,
    Gains,
    average_ranks,
    criteria_rows,
    fitted_scores,
    measure_gains,
    measure_hardness,
    rank_correlation,
    read_base,
)
from newllm_jax.cascade.experiment import train_cascade
from newllm_jax.cascade.paths import base_losses, routed_losses, token_path_scores
from newllm_jax.cascade.run import restore_cascade
from newllm_jax.smollm.alpaca import load_alpaca
from newllm_jax.smollm.base import load_base_and_data


@pytest.mark.quick
def test_equal_values_share_the_mean_of_their_ranks():
    values = np.asarray([[0.5, 2.0, 0.5], [-1.0, 2.0, 2.0]])
    assert average_ranks(values).tolist() == [2.5, 5, 2.5, 1, 5, 5]


@pytest.mark.quick
def test_rank_correlation_by_hand():
    first, second = np.asarray([1.0, 2, 3, 4]), np.asarray([10.0, 30, 20, 1e9])
    assert rank_correlation(first, second) == pytest.approx(1 - 6 * 2 / (4 * 15))  # two neighbours changed places
    assert rank_correlation(first, -second) == pytest.approx(-0.8)
    assert rank_correlation(first, np.ones(4)) is None


def test_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    first = draw.integers(0, 9, 500).astype(np.float32)
    second = (first + draw.normal(0, 4, 500)).round().astype(np.float32)
    assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


@pytest.mark.quick
def test_rows_by_hand():
    losses = np.asarray([[4.0, 1.0], [3.0, 0.0]], np.float32)
    scores = {"entropy": np.asarray([[1, 2], [0, 9]], np.float32), "cosine": np.full((2, 2), 0.1, np.float32)}
    gains = Gains(losses, -losses, 0, 0)
    entropy, cosine = criteria_rows(scores, losses, gains, 0.4, costs={"entropy": 0.25, "cosine": 0.0})
    assert entropy == {
        "criterion": "entropy", "target": None, "loss_correlation": pytest.approx(0.8),
        "gain_correlation": pytest.approx(-0.8), "hard_tokens": 2, "hard_ppl": pytest.approx(math.exp(3.5)),
        "easy_ppl": pytest.approx(math.exp(0.5)), "cost": 0.25,
    }  # fmt: skip
    assert (cosine["loss_correlation"], cosine["hard_tokens"], cosine["easy_ppl"]) == (None, 4, None)
    assert [row["gain_correlation"] for row in criteria_rows(scores, losses, None, 0.4, {**scores})] == [None, None]


@pytest.fixture(scope="module")
def read(tiny):
    """Base, data, and what a pass of the base gives on both splits."""
    base, data = load_base_and_data(tiny)
    params = jax.device_put(base.params)
    return base, data, [read_base(base.model, params, chunks) for chunks in (data.train, data.validation)]


def test_one_pass_gives_the_scores_of_every_criterion(read):
    base, data, (_, validation) = read
    for criterion in SINGLE_PASS:
        losses, scores = base_losses(base.model, base.params, data.validation, criterion)
        np.testing.assert_allclose(validation.scores[criterion], scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(validation.losses, losses.losses, rtol=1e-5)
    assert validation.hidden.shape == (5, 128, 16)


def test_a_probe_learns_the_loss_or_the_gain():
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(64, 128, 16)).astype(np.float32)
    losses, gain = 6 + np.abs(hidden[..., 0]), hidden[..., 1]  # more than the 4 nats that a gain is cut at
    tokens = BaseTokens(hidden, losses, {})
    scores = fitted_scores(tokens, tokens, None, 0)
    assert rank_correlation(-scores["probe"], losses) > 0.5
    probed = fitted_scores(tokens, tokens, Gains(gain, gain, 0, 0), 0)["probe"]
    assert rank_correlation(-probed, gain) > 0.5
    assert rank_correlation(-scores["oracle"], losses) == pytest.approx(1)
    assert abs(rank_correlation(scores["random"], losses)) < 0.05
    assert not np.array_equal(scores["random"], fitted_scores(tokens, tokens, None, 1)["random"])


def test_without_a_run_there_is_no_gain(tiny, read):
    told = list[str]()
    settings = {"base_model": tiny.base_model, "dataset": tiny.dataset, "train_chunks": 8, "validation_chunks": 5}
    results = measure_hardness({**settings, "hard_ratio": 0.25}, narrate=told.append)
    assert [line.split()[0] for line in told] == ["device", "base", "data"]
    assert (results["run"], results["data"]["val_tokens"], results["hard_ratio"]) == (None, 640, 0.25)
    assert results["base"]["val_loss"] == pytest.approx(float(read[2][1].losses.mean()), rel=1e-5)
    rows = {row["criterion"]: row for row in results["criteria"]}
    assert list(rows) == ["cosine", "entropy", "max_probability", "margin", "probe", "oracle", "random"]
    assert {row["gain_correlation"] for row in rows.values()} == {None}
    assert [row["target"] for row in rows.values() if row["target"]] == ["loss"]
    assert rows["entropy"]["hard_tokens"] == 160
    assert rows["oracle"]["hard_ppl"] == max(row["hard_ppl"] for row in rows.values())
    # by hand: a layer of 16 x (16 + 8) x 2 + 3 x 16 x 24 products, two of them, and a head of 16 x 257
    base = 2 * (2 * 16 * 24 + 3 * 16 * 24) + 16 * 257
    head, probe = 16 * 257 / base, 17 * 64 / base
    assert [row["cost"] for row in rows.values()] == [0, head, head, head, probe, None, 0]


@pytest.fixture(scope="module")
def design_run(tiny, tmp_path_factory):
    config = replace(
        tiny, num_stages=1, num_epochs=2, batch_size=4, learning_rate=3e-2, entry_layer=1, context="sequence",
        start="base", weights="lora", rank=4, head="base", trained_on="all", criterion="probe", hard_ratio=0.5,
    )  # fmt: skip
    return train_cascade(config, run_root=tmp_path_factory.mktemp("runs"), narrate=lambda _: None).run_dir


def test_gains_are_those_of_the_paths_of_a_run(design_run, read):
    run = restore_cascade(design_run)
    data = load_alpaca(run.tokenizer, run.config)
    gains = measure_gains(run, data)
    everywhere = np.ones((5, 128), bool)
    easy, hard = (routed_losses(run.trained, data.validation, path) for path in (~everywhere, everywhere))
    np.testing.assert_array_equal(gains.validation, easy.losses - hard.losses)
    np.testing.assert_allclose(easy.losses, read[2][1].losses, rtol=1e-4, atol=1e-5)
    assert gains.train.shape == (8, 128)
    assert (gains.easy_loss, gains.hard_loss) == (easy.mean, hard.mean)
    # the probe is that of the run, whose criterion is one
    probed = fitted_scores(*read[2], gains, run.config.seed)["probe"]
    own = token_path_scores(run.trained, run.base.model, run.routing.probe, data.validation)
    np.testing.assert_allclose(probed, own, atol=1e-4)
    assert probed.std() > 0.01


@pytest.mark.usefixtures("in_an_empty_folder")
def test_the_command_with_a_run(newllm, refused, design_run, tmp_path):
    code, out, err = newllm("hardness", design_run, "--output", "found/hardness.json")
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "found" / "hardness.json").read_text())
    assert (results["hard_ratio"], results["run"]["name"]) == (0.5, design_run.name)
    trained = json.loads((design_run / "results.json").read_text())
    assert results["run"]["easy_loss"] == pytest.approx(trained["ensemble"][0]["val_loss"], rel=1e-5)
    assert {name: results["base"][name] for name in ("source", "parameters", "layers")} == {
        name: trained["base"][name] for name in ("source", "parameters", "layers")
    }
    assert results["data"] == trained["data"]
    rows = {row["criterion"]: row for row in results["criteria"]}
    assert all(-1 <= row["gain_correlation"] <= 1 for row in rows.values())
    assert rows["probe"]["target"] == "gain"
    assert "trained to predict the gain, on 8 chunks" in out
    assert f"hard path of {design_run.name}" in out
    assert refused("hardness", "--train_chunks=4", design_run) == (
        "train_chunks: does not go with a run, whose own base and data are measured"
    )
