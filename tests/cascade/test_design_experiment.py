"""Whole runs of designs other than the published one, on a tiny base: what is measured, kept, resumed and generated."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import newllm_jax
from newllm_jax.cascade import experiment
from newllm_jax.cascade.ensemble import best_ensemble
from newllm_jax.cascade.experiment import train_cascade
from newllm_jax.cascade.generate import generate
from newllm_jax.cascade.paths import token_path_scores
from newllm_jax.cascade.plan import plan_cascade
from newllm_jax.cascade.probe import probe_gains
from newllm_jax.cascade.run import ROUTING
from newllm_jax.config import CascadeConfig
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.errors import InputError, Note
from newllm_jax.smollm.alpaca import load_alpaca
from newllm_jax.smollm.generate import generate_tokens, prompt_ids, stream_text
from newllm_jax.smollm.pretrained import load_smollm2
from newllm_jax.systems import evaluate
from newllm_jax.training import split

LAYER, HEAD = 1920, 257 * 16  # multiplications of the tiny base; keys and values of a layer are 256 of them
BASE = 2 * LAYER + HEAD
COSTS = {  # of the easy and the hard path
    "reentry": ((BASE + 256) / BASE, (BASE + LAYER + HEAD) / BASE),
    "skip": ((BASE + 17 * 64 - (LAYER - 256) + 64 - HEAD + 100 * 16 + 4 * 173) / BASE, (BASE + 17 * 64) / BASE),
}
TIMES = {"tokens_per_second", "seconds"}


def figures(results):
    """All that is measured, without times."""

    def timeless(content):
        if isinstance(content, dict):
            return {key: timeless(value) for key, value in content.items() if key not in TIMES}
        return [timeless(item) for item in content] if isinstance(content, list) else content

    return timeless({key: results[key] for key in ("base", "stages", "ensemble", "kept_stages", "test", "data")})


@pytest.fixture(scope="module", params=["reentry", "skip"])
def named(request):
    """The name of a run and the run."""
    return request.param, request.getfixturevalue(f"{request.param}_run")


@pytest.fixture
def restored(named):
    """The run as it is given back, and its chunks."""
    run = newllm_jax.restore(named[1].run_dir)
    return run, load_alpaca(run.tokenizer, run.config)


def plain_scores(run, chunks):
    """The score of each token, `[chunks, 128]`, in one pass over all of them."""
    design, base, params = run.trained.design, run.trained.base, run.trained.params
    hidden = jax.jit(lambda ids: design.decide(base, params, ids).hidden)(chunks[:, :-1])
    if run.config.criterion == "probe":
        return -np.asarray(probe_gains(run.routing.probe, hidden))
    logits = np.asarray(hidden, np.float64) @ np.asarray(base["embed"]["embedding"], np.float64).T
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return (np.exp(logits) * logits).sum(axis=-1)


def plain_losses(run, chunks, hard):
    design, base, params = run.trained.design, run.trained.base, run.trained.params

    @jax.jit
    def predict(ids, hard):
        return design.logits(base, params, design.decide(base, params, ids), hard)

    logits = np.asarray(predict(chunks[:, :-1], hard), np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    taken = np.take_along_axis(logits, chunks[:, 1:, None], axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(axis=-1)) - taken


def test_results_hold_the_contract(named):
    name, result = named
    results = json.loads((result.run_dir / "results.json").read_text())
    assert results == json.loads(json.dumps(result.results))
    (stage,) = results["stages"]
    assert {
        "stage", "added_layers", "total_layers", "stage_parameters", "total_parameters", "criterion", "hard_ratio",
        "threshold", "train_tokens", "val_tokens", "epochs", "last", "best", "seconds", "path_flops",
    } <= stage.keys()  # fmt: skip
    assert stage["path_flops"] == pytest.approx(dict(zip(("easy", "hard"), COSTS[name], strict=True)))
    base, row = results["ensemble"]
    assert base["flops"] == 1 and base["exit_rates"] == [1]
    assert row["flops"] == pytest.approx(np.dot(COSTS[name], row["exit_rates"]))
    assert sum(group["tokens"] for group in row["exit_groups"]) == results["data"]["val_tokens"] == 6 * 128
    assert row["parameters"] - base["parameters"] == stage["stage_parameters"]
    assert [each.keys() for each in results["test"]] == [{"stages", "loss", "ppl", "flops"}] * 2
    assert (results["data"]["calibration_chunks"], results["data"]["test_chunks"]) == (6, 6)
    assert stage["train_tokens"] == (461 if name == "reentry" else 9 * 128)  # 0.4 of them, or all
    assert CascadeConfig.from_dict(results["config"]).has_published_design is False


@pytest.mark.parametrize("part", ["validation", "test"])
def test_the_ensemble_is_the_plain_computation(named, restored, part):
    name, result = named
    run, data = restored
    chunks = getattr(data, part)
    scores = token_path_scores(run.trained, run.base.model, run.routing.probe, chunks)
    np.testing.assert_allclose(scores, plain_scores(run, chunks), rtol=1e-4, atol=1e-5)
    hard = scores <= run.routing.threshold  # of those: tokens that share the threshold's score do so but for rounding
    losses, base = plain_losses(run, chunks, hard), plain_losses(base_only(run), chunks, hard)
    assert 0.1 < hard.mean() < 0.9
    if part == "test":
        alone, row = result.results["test"]
        assert alone["loss"] == pytest.approx(base.mean(), rel=1e-5)
        assert row["loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert row["ppl"] == pytest.approx(np.exp(losses.mean()), rel=1e-3)
    else:
        alone, row = result.results["ensemble"]
        assert alone["val_loss"] == pytest.approx(base.mean(), rel=1e-5)
        assert row["val_loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert row["exit_rates"] == pytest.approx([1 - hard.mean(), hard.mean()])
        for group, mask in zip(row["exit_groups"], (~hard, hard), strict=True):
            assert group["tokens"] == mask.sum()
            assert group["loss"] == pytest.approx(losses[mask].mean(), rel=1e-5)
            assert group["base_loss"] == pytest.approx(base[mask].mean(), rel=1e-5)
    easy, costly = COSTS[name]
    assert row["flops"] == pytest.approx(easy + hard.mean() * (costly - easy))


def base_only(run):
    """The same run, with a design that is the base."""

    class Base:
        def decide(self, base, params, ids):
            return run.base.model.apply({"params": base}, ids)[0]

        def logits(self, base, params, decision, hard):
            return decision

    return replace(run, trained=replace(run.trained, design=Base()))


def test_thresholds_are_set_on_the_calibration_chunks(named, restored):
    name, result = named
    run, data = restored
    easy, costly = COSTS[name]
    share = (0.9 - easy) / (costly - easy) if name == "skip" else 0.4
    scores = plain_scores(run, data.calibration)
    assert run.routing.threshold == pytest.approx(np.quantile(scores, share), abs=1e-5)
    assert np.mean(scores <= run.routing.threshold + 1e-6) == pytest.approx(share, abs=0.02)  # some share a score
    assert result.results["stages"][0]["threshold"] == run.routing.threshold
    for other in (data.train, data.validation):
        assert abs(np.quantile(plain_scores(run, other), share) - run.routing.threshold) > 1e-4


def test_restore_and_evaluate_give_the_same_numbers_bit_for_bit(named):
    _, result = named
    assert evaluate(result.run_dir)["ensemble"] == result.results["ensemble"]


def test_the_plan_counts_what_a_run_has(named):
    _, result = named
    plan = plan_cascade(CascadeConfig.from_dict(result.results["config"]))
    (stage,) = result.results["stages"]
    assert plan["stages"][0]["stage_parameters"] == stage["stage_parameters"]
    assert plan["stages"][0]["path_flops"] == stage["path_flops"]
    assert plan["parameters"] == stage["total_parameters"]
    assert plan["data"] == result.results["data"]
    assert plan["updates"] == 2 * 3
    assert plan["flops"] == pytest.approx(result.results["ensemble"][1]["flops"], abs=0.1)


def test_the_plan_tells_the_memory(reentry_plan, reentry_run):
    """In this process, before the run."""
    assert reentry_plan["estimated_memory_bytes"] == pytest.approx(reentry_run.results["peak_memory_bytes"], rel=0.3)


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]], ids=["run", "dry_run"])
def test_a_cost_below_the_easy_path_is_refused(refused, skip_config, dry_run, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(skip_config.to_dict()))
    line = refused("cascade", f"--config={tmp_path / 'run.json'}", "--flops=0.5", *dry_run, f"--run_root={tmp_path}")
    assert (
        line == f"flops: must be at least {COSTS['skip'][0]:.3f}, what a token costs on the easy path, or none, not 0.5"
    )


def same_runs(left, right):
    """The same parameters, probe and threshold, bit for bit."""
    left, right = (newllm_jax.restore(each) for each in (left, right))
    trees = [
        (each.trained.params, each.routing.probe, each.routing.threshold, each.kept_stages) for each in (left, right)
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, trees), strict=True))


def test_a_stop_changes_nothing_and_the_base_stays_frozen(reentry_config, reentry_run, tmp_path, monkeypatch):
    order, load, loaded = split.epoch_order, experiment.load_base_and_data, []

    def interrupted(seed, number, examples):
        if number == 2:
            raise KeyboardInterrupt
        return order(seed, number, examples)

    monkeypatch.setattr(split, "epoch_order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_cascade(reentry_config, run_root=tmp_path, narrate=str)
    monkeypatch.undo()
    (run_dir,) = tmp_path.iterdir()
    assert not (run_dir / "results.json").exists()
    with pytest.raises(InputError, match=r"is not finished; cascade.py --resume .* continues it"):
        newllm_jax.restore(run_dir)
    monkeypatch.setattr(experiment, "load_base_and_data", lambda config: loaded.append(load(config)) or loaded[-1])
    resumed = train_cascade(resume=run_dir, narrate=str)
    assert figures(resumed.results) == figures(reentry_run.results)
    assert same_runs(run_dir, reentry_run.run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [(1, 1), (1, 2)]
    fresh = load_smollm2(reentry_config.base_model).params
    for tree in (loaded[0][0].params, newllm_jax.restore(run_dir).trained.base):
        assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (tree, fresh)), strict=True))


def test_training_changes_every_parameter(named, restored):
    run, _ = restored
    moment = np.eye(16, dtype=np.float32)
    initial = run.trained.design.init(run.trained.base, run.config.seed, moment)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), initial, run.trained.params)))
    epochs = named[1].results["stages"][0]["epochs"]
    assert (epochs[1]["val_loss"] < epochs[0]["val_loss"]) or named[0] == "skip"


def test_a_finished_run_says_so(skip_run):
    told = list[str]()
    before = (skip_run.run_dir / "results.json").read_bytes()
    again = train_cascade(resume=skip_run.run_dir, narrate=told.append)
    assert again.results == skip_run.results
    assert "finished, all 1 stages" in told
    assert (skip_run.run_dir / "results.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["deleted", "cut", "of another run"])
def test_routing_that_is_gone_is_made_again(damage, skip_run, reentry_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(skip_run.run_dir, run_dir)
    file = run_dir / ROUTING
    if damage == "deleted":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        shutil.copy(reentry_run.run_dir / ROUTING, file)
    told = nullcontext() if damage == "deleted" else pytest.warns(Note, match=f"{ROUTING}: damaged, or of something")
    again = nullcontext() if damage == "deleted" else pytest.warns(Note)
    with told, pytest.raises(InputError, match=r"is not finished; cascade.py --resume .* continues it") as raised:
        newllm_jax.restore(run_dir)
    assert "\n" not in str(raised.value)
    if damage == "of another run":
        return
    with again:
        resumed = train_cascade(resume=run_dir, narrate=str)
    assert figures(resumed.results) == figures(skip_run.results)
    assert same_runs(run_dir, skip_run.run_dir)


def test_generate_tells_the_exits_and_their_cost(newllm, reentry_run):
    code, out, _ = newllm("generate", reentry_run.run_dir, "--prompt=Count alpha", "--max_words=12", "--temperature=0")
    assert code == 0
    told = re.search(r"tokens by exit: base (\d+), stage 1 (\d+); a token cost (\S+) passes of the base", out)
    easy, hard = int(told[1]), int(told[2])
    assert 0 < easy + hard <= 12
    expected = np.dot(COSTS["reentry"], [easy, hard]) / (easy + hard)
    assert float(told[3]) == pytest.approx(expected, abs=0.0051)


def test_a_stage_that_harms_is_not_kept(newllm, skip_run):
    """The run generates what the base alone does; with the stage it would not."""
    base, row = skip_run.results["ensemble"]
    assert row["val_loss"] > base["val_loss"] and skip_run.results["kept_stages"] == 0
    run = newllm_jax.restore(skip_run.run_dir)
    assert run.kept_stages == 0
    pretrained = load_smollm2(run.config.base_model)
    ids, greedy = prompt_ids(run.tokenizer, "Count alpha"), Sampling(temperature=0)
    expected = "".join(stream_text(run.tokenizer, generate_tokens(pretrained, ids, 12, greedy)))
    code, out, _ = newllm("generate", skip_run.run_dir, "--prompt=Count alpha", "--max_words=12", "--temperature=0")
    assert (code, out) == (0, expected + "\n")
    exits = Exits()
    staged = "".join(generate(replace(run, kept_stages=1), "Count alpha", max_words=12, sampling=greedy, exits=exits))
    assert staged != expected and len(exits.counts) == 2


def test_a_stage_that_helps_is_kept(reentry_run):
    base, row = reentry_run.results["ensemble"]
    assert row["val_loss"] < base["val_loss"]
    assert reentry_run.results["kept_stages"] == newllm_jax.restore(reentry_run.run_dir).kept_stages == 1


LOSSES = st.lists(st.floats(0, 20) | st.sampled_from([1.0, 2.0]), min_size=1, max_size=8)


@given(LOSSES, st.floats(0, 20))
def test_the_best_ensemble_is_never_worse_with_one_more(losses, another):
    rows = [{"stages": number, "val_loss": loss} for number, loss in enumerate([*losses, another])]
    fewer, more = best_ensemble(rows[:-1]), best_ensemble(rows)
    assert rows[more]["val_loss"] == min([*losses, another]) <= rows[fewer]["val_loss"] <= rows[0]["val_loss"]
    assert more in (fewer, len(losses))  # of equal ones the smallest
    assert (more == len(losses)) == (another < min(losses))


def test_the_published_design_keeps_all_its_stages():
    config = CascadeConfig()
    assert config.has_published_design and config.kept_stages == "all"
    assert (config.criterion, config.flops, config.calibration_chunks, config.whole_rows) == ("cosine", None, 0, False)


def test_scores_do_not_depend_on_the_batch(restored):
    """Padding of the last batch changes nothing: 6 chunks beside 2."""
    run, data = restored
    six, two = (
        token_path_scores(run.trained, run.base.model, run.routing.probe, chunks)
        for chunks in (data.test, data.test[:2])
    )
    assert (six[:2] == two).all()
