"""Whole CASCADE runs on a tiny base: what stays frozen, what resumes, what is counted, what is reported."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import pytest

import newllm_jax
from newllm_jax.cascade import experiment, extraction
from newllm_jax.cascade.experiment import train_cascade
from newllm_jax.cascade.plan import plan_cascade
from newllm_jax.cascade.run import stage_owner
from newllm_jax.cascade.stage.model import init_stage
from newllm_jax.config import CascadeConfig
from newllm_jax.content import sealed
from newllm_jax.errors import InputError, Note, Stopped
from newllm_jax.records.directory import RunDir
from newllm_jax.smollm.base import load_base_and_data
from newllm_jax.smollm.flops import Costs
from newllm_jax.smollm.pretrained import load_smollm2
from newllm_jax.training import feed
from newllm_jax.training.checkpoint_folder import read_trees

TIMINGS = {"tokens_per_second", "seconds"}


def quiet(_: str) -> None:
    pass


def train(config, tmp_path, **options):
    return train_cascade(config, run_root=tmp_path, narrate=quiet, **options)


def figures(results):
    """All that is measured, without times."""

    def timeless(content):
        if isinstance(content, dict):
            return {key: timeless(value) for key, value in content.items() if key not in TIMINGS}
        return [timeless(item) for item in content] if isinstance(content, list) else content

    return timeless({key: results[key] for key in ("base", "stages", "ensemble", "data")})


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return train(tiny, tmp_path_factory.mktemp("whole"))


@pytest.mark.quick
def test_results_hold_the_contract(tiny, whole):
    results = json.loads((whole.run_dir / "results.json").read_text())
    assert results == json.loads(json.dumps(whole.results))
    assert {
        "schema_version", "system", "config", "command", "seconds", "peak_memory_bytes", "environment", "data", "base",
        "stages", "ensemble",
    } <= results.keys()  # fmt: skip
    assert results["system"] == "cascade"
    assert {"source", "fallback", "fingerprint", "train_tokens", "val_tokens"} <= results["data"].keys()
    assert {"source", "parameters", "layers", "val_loss", "val_ppl"} <= results["base"].keys()
    assert {
        "stage", "added_layers", "total_layers", "stage_parameters", "total_parameters", "criterion", "hard_ratio",
        "threshold", "train_tokens", "val_tokens", "epochs", "last", "best", "seconds",
    } <= results["stages"][0].keys()  # fmt: skip
    assert results["kept_stages"] == len(newllm_jax.restore(whole.run_dir).stages) == 3  # as published: all
    assert [len(entry["exit_groups"]) for entry in results["ensemble"]] == [1, 2, 3, 4]
    assert CascadeConfig.from_dict(results["config"]) == tiny
    assert {path.name for path in whole.run_dir.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "results.json", "report.md", "report.html", "curves.png",
        "checkpoints",
    }  # fmt: skip


def test_counts_follow_the_quantile_rule(tiny, whole):
    stages = whole.results["stages"]
    assert whole.results["data"]["train_tokens"] == 8 * 128
    assert [stage["train_tokens"] for stage in stages] == [614, 368, 221]
    assert [stage["val_tokens"] for stage in stages] == [384, 230, 138]
    plan = plan_cascade(tiny)
    for planned, stage in zip(plan["stages"], stages, strict=True):
        assert {key: stage[key] for key in planned if key != "updates_per_epoch"} == {
            key: planned[key] for key in planned if key != "updates_per_epoch"
        }
    assert plan["data"] == whole.results["data"]
    assert plan["estimated_memory_bytes"] == pytest.approx(whole.results["peak_memory_bytes"], rel=0.3)


@pytest.mark.quick
def test_the_ensemble_sums_up_over_all_tokens(whole):
    base, *ensembles = whole.results["ensemble"]
    tokens = whole.results["data"]["val_tokens"]
    assert base["val_loss"] == whole.results["base"]["val_loss"]
    for entry in ensembles:
        groups = entry["exit_groups"]
        assert sum(entry["exit_rates"]) == pytest.approx(1)
        assert sum(group["tokens"] for group in groups) == tokens
        assert sum(group["tokens"] * group["loss"] for group in groups) / tokens == pytest.approx(entry["val_loss"])
        assert sum(group["tokens"] * group["base_loss"] for group in groups) / tokens == pytest.approx(base["val_loss"])
        assert groups[0]["loss"] == groups[0]["base_loss"]


def test_the_base_stays_frozen_bit_for_bit(tiny, monkeypatch, tmp_path):
    seen = []
    load = experiment.load_base_and_data
    monkeypatch.setattr(experiment, "load_base_and_data", lambda config: seen.append(load(config)) or seen[-1])
    result = train(tiny.override({"num_stages": 1}), tmp_path)
    fresh = load_smollm2(tiny.base_model)
    for left, right in zip(jax.tree.leaves(seen[0][0].params), jax.tree.leaves(fresh.params), strict=True):
        assert (left == right).all()
    assert len(seen) == 1
    saved = newllm_jax.restore(result.run_dir)
    first = init_stage(saved.stage, tiny.seed, 1)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), first, saved.stages[0].params)
    assert all(jax.tree.leaves(changed))  # the query and key projections too: they decay


def test_last_and_best_weights_are_both_kept(tiny, whole, tmp_path):
    stage = whole.results["stages"][0]
    assert stage["last"]["epoch"] == len(stage["epochs"]) > stage["best"]["epoch"]
    kept = {path.name for path in (whole.run_dir / "checkpoints" / "stage_1").iterdir() if path.is_dir()}
    assert kept == {f"epoch_{stage['last']['epoch']}", f"epoch_{stage['best']['epoch']}"}
    restored = newllm_jax.restore(whole.run_dir).stages[0].params
    owner = stage_owner(RunDir.open(whole.run_dir), [])
    for which, equal in (("last", True), ("best", False)):
        folder = whole.run_dir / "checkpoints" / "stage_1" / f"epoch_{stage[which]['epoch']}"
        trees, _, _ = read_trees(folder, owner, stage[which]["epoch"], {"params": restored})
        pairs = zip(jax.tree.leaves(trees["params"]), jax.tree.leaves(restored), strict=True)
        assert all((a == b).all() for a, b in pairs) == equal
    best = train(tiny.override({"stage_weights": "best"}), tmp_path).results
    assert figures(best)["stages"][0] == figures(whole.results)["stages"][0]
    assert best["stages"][1]["threshold"] != whole.results["stages"][1]["threshold"]
    assert best["ensemble"][1]["val_loss"] != whole.results["ensemble"][1]["val_loss"]


def test_stages_that_are_swapped_or_missing_are_told(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole.run_dir, run_dir)
    first, second, third = (run_dir / "checkpoints" / f"stage_{number}" for number in (1, 2, 3))
    second.rename(tmp_path / "second")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        newllm_jax.restore(run_dir)
    first.rename(second)
    (tmp_path / "second").rename(first)
    with pytest.raises(InputError, match="stage_1: none of the .* part 'stage_2', not 'stage_1'"):
        newllm_jax.restore(run_dir)
    first.rename(tmp_path / "second")
    second.rename(first)
    (tmp_path / "second").rename(second)
    shutil.rmtree(third)
    with pytest.raises(InputError, match=r"has 2 of its 3 stages; cascade.py --resume .* trains the others again"):
        newllm_jax.restore(run_dir)
    assert figures(train_cascade(resume=run_dir, narrate=quiet).results) == figures(whole.results)
    assert len(newllm_jax.restore(run_dir).stages) == 3


def test_a_stage_that_followed_other_weights_is_told(whole, tmp_path):
    """As where stage 1 was trained again on another device, and stage 2 came back from a mirror."""
    run = RunDir.open(whole.run_dir)
    first = newllm_jax.restore(whole.run_dir).stages[0]
    owner = stage_owner(run, [first])
    assert stage_owner(run, [replace(first, params=jax.tree.map(lambda leaf: leaf + 1e-6, first.params))]) != owner
    shutil.copytree(whole.run_dir, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "stage_2").rglob("manifest/metadata"):
        content = json.loads(file.read_text())
        del content["sha256"]
        file.write_text(json.dumps(sealed({**content, "after": "of other weights"})))
    with pytest.raises(InputError, match=f"stage_2: none of the .* after 'of other weights', not '{owner.after}'"):
        newllm_jax.restore(tmp_path / "run")


def interrupt(monkeypatch, stage: int, epoch: int) -> None:
    """Ctrl-C at the start of an epoch of a stage."""
    from newllm_jax.training import split

    order, started = split.epoch_order, []

    def interrupted(seed, number, examples):
        if number == 1:
            started.append(number)
        if len(started) == stage and number == epoch:
            raise KeyboardInterrupt
        return order(seed, number, examples)

    monkeypatch.setattr(split, "epoch_order", interrupted)


@pytest.mark.parametrize(("stage", "epoch"), [(1, 2), (2, 1), (3, 2)])
def test_a_stop_changes_nothing(stage, epoch, tiny, whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, stage, epoch)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path)
    monkeypatch.undo()
    (run_dir,) = tmp_path.iterdir()
    assert not (run_dir / "results.json").exists()
    resumed = train_cascade(resume=run_dir, narrate=quiet)
    assert figures(resumed.results) == figures(whole.results)
    same_files(resumed.run_dir, whole.run_dir)


def same_files(left: Path, right: Path) -> None:
    """The metrics of every epoch once, and the same weights."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (left, right)]
    assert [(line["stage"], line["epoch"], line["val_loss"]) for line in lines[0]] == [
        (line["stage"], line["epoch"], line["val_loss"]) for line in lines[1]
    ]
    runs = [newllm_jax.restore(run) for run in (left, right)]
    for one, other in zip(runs[0].stages, runs[1].stages, strict=True):
        assert one.threshold == other.threshold
        assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True))


@pytest.mark.parametrize("damaged", ["", "piece", "hidden states"])
def test_the_extraction_goes_on_where_it_stopped(damaged, tiny, whole, tmp_path, monkeypatch):
    extract_piece, calls = extraction._extract_piece, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return extract_piece(*arguments)

    monkeypatch.setattr(extraction, "_extract_piece", counted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path)
    (run_dir,) = tmp_path.iterdir()
    piece, states = sorted((run_dir / "extraction").iterdir())
    assert (piece.name, states.name) == ("train-000000.arrays", "train.hidden")
    if damaged:
        file = piece if damaged == "piece" else states
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(Note, match="its content is made anew") if damaged else nullcontext():
        resumed = train_cascade(resume=run_dir, narrate=quiet)
    assert len(calls) == (4 if damaged else 3)
    assert figures(resumed.results) == figures(whole.results)


def test_stages_that_read_files_learn_the_same(tiny, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "BLOCK_BYTES", 3 * 64 * 17 * 4)  # three updates
    read = []
    load = feed.FileFeed._load
    monkeypatch.setattr(feed.FileFeed, "_load", lambda self, first: read.append(first) or load(self, first))
    in_files = train(tiny.override({"examples": "files"}), tmp_path)
    assert {0, 3, 6, 9} <= set(read)
    assert figures(in_files.results) == figures(whole.results)
    same_files(in_files.run_dir, whole.run_dir)


@pytest.mark.quick
def test_more_stages_can_follow(tiny, whole, tmp_path):
    short = train(tiny.override({"num_stages": 1}), tmp_path)
    resumed = train_cascade(resume=short.run_dir, overrides={"num_stages": 3}, narrate=quiet)
    assert figures(resumed.results) == figures(whole.results)
    told: list[str] = []
    again = train_cascade(resume=short.run_dir, narrate=told.append)
    assert again.results == json.loads((short.run_dir / "results.json").read_text())
    assert any("raise num_stages" in line for line in told)
    before = (short.run_dir / "config.json").read_text()
    with pytest.raises(InputError, match=r"num_stages: .* has 3 stages already, not 2"):
        train_cascade(resume=short.run_dir, overrides={"num_stages": 2}, narrate=quiet)
    assert (short.run_dir / "config.json").read_text() == before
    with pytest.raises(Stopped):  # before a fourth one begins
        train_cascade(resume=short.run_dir, overrides={"num_stages": 4}, narrate=quiet, stop=lambda: True)
    assert len(newllm_jax.restore(short.run_dir).stages) == 3


def test_a_folder_that_looks_like_a_stage_is_none(tiny, tmp_path):
    short = train(tiny.override({"num_stages": 1}), tmp_path)
    stages = short.run_dir / "checkpoints"
    shutil.copytree(stages / "stage_1", stages / "stage_2_backup")
    train_cascade(resume=short.run_dir, overrides={"num_stages": 2}, narrate=quiet)
    assert (stages / "stage_2_backup").exists()


def test_fp16_gives_each_stage_a_loss_scale_of_its_own(tiny, tmp_path, fp16_on_a_cpu):
    fp16 = tiny.override({"precision": "fp16", "num_stages": 2, "num_epochs": 1, "learning_rate": 1e-3})
    whole = train(fp16, tmp_path).results
    assert all(stage["epochs"][0]["skipped_updates"] for stage in whole["stages"])
    short = train(fp16.override({"num_stages": 1}), tmp_path)
    resumed = train_cascade(resume=short.run_dir, overrides={"num_stages": 2}, narrate=quiet)
    assert figures(resumed.results) == figures(whole)
    assert plan_cascade(fp16)["environment"]["precision"] == "fp16"


def test_resuming_as_another_experiment_is_refused(tiny, whole, tmp_path):
    with pytest.raises(InputError, match=r"hard_ratio: .* was trained with 0.6, not 0.5"):
        train_cascade(resume=whole.run_dir, overrides={"hard_ratio": 0.5}, narrate=quiet)
    with pytest.raises(InputError, match=r"num_epochs: .* was trained with 8, not 9"):
        train_cascade(resume=whole.run_dir, overrides={"num_epochs": 9}, narrate=quiet)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(tiny.dataset).read_text().replace("alpha", "zeta"))
    with pytest.raises(InputError, match=r"dataset: .* is not what the run was trained on"):
        train_cascade(resume=whole.run_dir, overrides={"dataset": str(other)}, narrate=quiet)
    base = tmp_path / "base"
    shutil.copytree(tiny.base_model, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "rope_theta": 10.0}))
    with pytest.raises(InputError, match=r"base_model: .* is not what the run was trained on"):
        train_cascade(resume=whole.run_dir, overrides={"base_model": str(base)}, narrate=quiet)


def test_the_report_says_that_handing_on_makes_it_worse(whole):
    report = (whole.run_dir / "report.md").read_text()
    ensemble = whole.results["ensemble"]
    best = min(ensemble, key=lambda entry: entry["val_loss"])
    said = "handing tokens on makes the model worse" if best["stages"] == 0 else f"Base+{best['stages']} is best"
    assert said in report
    assert "Not comparable with the published figures" in report


def test_the_example_is_the_start_of_the_validation_text_with_its_exits(tiny, whole):
    base, data = load_base_and_data(tiny)
    example, exits = whole.results["example"], whole.results["ensemble"][-1]["exit_rates"]
    assert "".join(example["tokens"]) == base.tokenizer.decode(data.validation[0, : tiny.sample_words].tolist())
    assert len(example["exits"]) == tiny.sample_words == 80
    assert {place for place in example["exits"]} <= {place for place, rate in enumerate(exits) if rate}
    assert len(set(example["exits"])) > 1


def test_a_stage_costs_what_it_adds(tiny, whole):
    base, _ = load_base_and_data(tiny)
    costs = Costs.from_config(base.model.config)
    stage = costs.published_stage(1, "cosine") / costs.base
    for row in whole.results["ensemble"]:
        passed = sum(place * rate for place, rate in enumerate(row["exit_rates"]))
        assert row["flops"] == pytest.approx(1 + passed * stage)
    assert whole.results["ensemble"][-1]["flops"] > 1


@pytest.mark.quick
def test_evaluate_measures_the_same_again(whole):
    from newllm_jax.systems import evaluate

    before = (whole.run_dir / "config.json").stat().st_mtime_ns
    again = evaluate(whole.run_dir)["ensemble"]
    assert again == whole.results["ensemble"]
    assert (whole.run_dir / "config.json").stat().st_mtime_ns == before
