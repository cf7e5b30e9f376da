"""Curves of quality against compute, beside plain computations on a design of which all is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade.ensemble import TrainedStage, evaluate_ensemble
from newllm_jax.cascade.extraction import extract, run_stage
from newllm_jax.cascade.frontier import POLICIES, SHARES, design_curve, published_curve
from newllm_jax.cascade.paths import TrainedDesign, build_routing, share_threshold
from newllm_jax.cascade.probe import probe_gains
from newllm_jax.cascade.stage.designs import Decision
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.config import CascadeConfig
from newllm_jax.smollm.flops import PathCosts
from tests.cascade.conftest import LLAMA, REENTRY

IDS = 61
TABLE = np.random.default_rng(4).normal(size=(IDS, 16)).astype(np.float32)
STRENGTHS = np.linspace(-4, 6, IDS).astype(np.float32)  # the last ids gain, the first ones lose
CONFIG = CascadeConfig(**REENTRY)


@dataclass(frozen=True)
class Known:
    """The easy path knows nothing; the hard one says that id j follows id i as `next_id` has it, some of it wrongly."""

    config: CascadeConfig = CONFIG

    def decide(self, base, trained, ids):
        return Decision(jnp.asarray(TABLE)[ids], ids)

    def logits(self, base, trained, decision, hard):
        said = jnp.asarray(STRENGTHS)[decision.states][..., None] * jax.nn.one_hot(next_id(decision.states), IDS)
        return jnp.where(hard[..., None], said, 0)

    def costs(self, llama):
        return PathCosts(0.9, 1.5)


def next_id(ids):
    return (7 * ids + 3) % IDS


def write_chunks(count, seed):
    """Ids `[count, 129]`, four in five of which follow the rule."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, IDS, (count, 129))
    for place in range(128):
        follows = random.random(count) < 0.8
        ids[:, place + 1] = np.where(follows, next_id(ids[:, place]), ids[:, place + 1])
    return ids.astype(np.int32)


def plain_losses(chunks):
    """Of both paths, `[chunks, 128]`."""
    before, after = chunks[:, :-1], chunks[:, 1:]
    strength = STRENGTHS[before].astype(np.float64)
    hard = np.log(IDS - 1 + np.exp(strength)) - np.where(next_id(before) == after, strength, 0)
    return np.full(before.shape, np.log(IDS)), hard


@pytest.fixture(scope="module")
def curves(llama):
    """Routing, calibration chunk (one: others score beyond its range), test chunks, and the curve of each policy."""
    trained, calibration, chunks = TrainedDesign(Known(), {}, {}), write_chunks(1, 1), write_chunks(20, 2)
    routing = build_routing(trained, llama.base, write_chunks(60, 3), calibration, CONFIG)
    found = {
        policy: design_curve(trained, llama.base, routing, calibration, chunks, policy) for policy in POLICIES
    }  # fmt: skip
    return routing, calibration, chunks, found


@pytest.mark.parametrize("policy", POLICIES)
def test_shares_0_and_1_are_the_pure_paths(curves, policy):
    *_, chunks, found = curves
    easy, hard = plain_losses(chunks)
    assert [point["asked"] for point in found[policy]] == list(SHARES)
    for point, losses, share in ((found[policy][0], easy, 0), (found[policy][-1], hard, 1)):
        assert point["hard_share"] == share
        assert point["loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert point["ppl"] == pytest.approx(np.exp(losses.mean()), rel=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_costs_are_those_of_the_paths_that_tokens_took(curves, policy):
    shares = [point["hard_share"] for point in curves[-1][policy]]
    assert shares == sorted(shares)
    assert shares == pytest.approx(SHARES, abs=0.04 if policy == "oracle" else 0.15)  # by 128 tokens that calibrate
    flops = [point["flops"] for point in curves[-1][policy]]
    assert flops == pytest.approx([0.9 * (1 - share) + 1.5 * share for share in shares])


def test_the_oracle_is_the_best_choice_and_the_criterion_lies_between_it_and_chance(curves):
    *_, chunks, found = curves
    easy, hard = (losses.ravel() for losses in plain_losses(chunks))
    gains = np.sort(easy - hard)[::-1]

    def best(point):
        """The loss where those tokens are hard that gain most, as many as there are."""
        count = round(point["hard_share"] * len(gains))
        return (easy.sum() - gains[:count].sum()) / len(gains)

    for criterion, oracle, chance in zip(*(found[policy] for policy in POLICIES), strict=True):
        assert oracle["loss"] == pytest.approx(best(oracle), rel=1e-5)
        share = chance["hard_share"]
        assert chance["loss"] == pytest.approx((1 - share) * easy.mean() + share * hard.mean(), abs=0.06)
        assert best(criterion) - 1e-6 <= criterion["loss"] <= chance["loss"] + 1e-6
    middle = SHARES.index(0.5)
    assert found["criterion"][middle]["loss"] < found["random"][middle]["loss"] - 0.2


def test_the_criterion_is_the_probe_with_thresholds_of_other_chunks(curves):
    routing, calibration, chunks, found = curves
    easy, hard = plain_losses(chunks)
    scores, measured = (-np.asarray(probe_gains(routing.probe, TABLE[ids[:, :-1]])) for ids in (calibration, chunks))
    assert routing.threshold == pytest.approx(np.quantile(scores, 0.6), abs=1e-5)
    for point in found["criterion"][1:-1]:
        mask = measured <= point["threshold"]
        assert point["threshold"] == pytest.approx(np.quantile(scores, point["asked"]), abs=1e-5)
        assert point["hard_share"] == pytest.approx(mask.mean(), abs=1e-3)
        assert point["loss"] == pytest.approx(np.where(mask, hard, easy).mean(), abs=5e-3)
        assert point["low"] < point["loss"] < point["high"]


@pytest.mark.parametrize(("flops", "share"), [(1.05, 0.25), (1.2, 0.5), (9.0, 1.0)])
def test_a_threshold_for_a_cost(llama, flops, share):
    config = CONFIG.override({"flops": flops})
    trained, calibration = TrainedDesign(Known(config), {}, {}), write_chunks(40, 5)
    routing = build_routing(trained, llama.base, write_chunks(8, 3), calibration, config)
    scores = -np.asarray(probe_gains(routing.probe, TABLE[calibration[:, :-1]]))
    hard = np.mean(scores <= routing.threshold)
    assert hard == pytest.approx(share, abs=0.02)  # tokens of one id share a score
    assert min(flops, 1.5) == pytest.approx(0.9 + 0.6 * hard, abs=0.02)


def test_the_ends_of_the_thresholds():
    scores = np.asarray([0.5, -2, 7], np.float32)
    assert share_threshold(scores, 0) < -1e30 and share_threshold(scores, 1) > 1e30
    assert share_threshold(scores, 0.5) == 0.5


@pytest.mark.parametrize(("criterion", "stage_cost"), [("cosine", 1536), ("entropy", 1536 + 16 * 61)])
def test_the_published_curve_is_the_ensemble_at_the_ratio_of_a_run(llama, criterion, stage_cost):
    """Two stages; thresholds are quantiles of what each gets. By the cosine only the last head is needed."""
    stage = Stage(stage_config(LLAMA, 1))
    params = [jax.tree.map(lambda leaf: 6 * leaf, init_stage(stage, 0, number)) for number in (1, 2)]
    random = np.random.default_rng(0)
    train, test = (
        extract(llama.base, llama.params, random.integers(0, 61, (count, 129)).astype(np.int32), criterion)
        for count in (6, 3)
    )
    first = np.quantile(train.scores, 0.6)
    handed_on = run_stage(stage, params[0], train.take(np.flatnonzero(train.scores <= first)), criterion)
    thresholds = [float(first), float(np.quantile(handed_on.scores, 0.6))]
    untrained = [TrainedStage(each, float("nan")) for each in params]
    (point,) = published_curve(test, train, stage, untrained, criterion, LLAMA, [0.6])
    run = [replace(each, threshold=threshold) for each, threshold in zip(untrained, thresholds, strict=True)]
    row = evaluate_ensemble(test, stage, run, criterion, 0)[-1]
    assert point["loss"] == pytest.approx(row["val_loss"], rel=1e-6)
    assert 0 < row["exit_rates"][2] < point["hard_share"] == pytest.approx(1 - row["exit_rates"][0])
    depth = row["exit_rates"][1] + 2 * row["exit_rates"][2]
    base = 4 * 1920 + 16 * 61
    assert point["flops"] == pytest.approx(1 + depth * stage_cost / base)
    none, every = published_curve(test, train, stage, untrained, criterion, LLAMA, [0, 1])
    assert (none["flops"], none["hard_share"]) == (1, 0)
    assert none["loss"] == pytest.approx(test.losses.mean(), rel=1e-6)
    through = test
    for each in params:
        through = run_stage(stage, each, through, criterion)
    assert every["loss"] == pytest.approx(through.losses.mean(), rel=1e-6)
    assert every["flops"] == pytest.approx(1 + 2 * stage_cost / base)
