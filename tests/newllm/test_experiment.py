"""Whole runs: resuming changes nothing, early stopping, what a run leaves behind, the model given back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import newllm_jax
from newllm_jax.config import NewLLMConfig, load_config
from newllm_jax.content import sealed
from newllm_jax.errors import InputError, NumericalError
from newllm_jax.newllm import experiment, updates
from newllm_jax.newllm.experiment import train_newllm
from newllm_jax.newllm.model import DROPOUTS
from newllm_jax.newllm.plan import plan_newllm
from newllm_jax.newllm.run import evaluate_run, init_params
from newllm_jax.records.directory import RunDir
from newllm_jax.training import loss_scale
from newllm_jax.training.checkpoint import Checkpoints
from newllm_jax.training.checkpoint_folder import epoch_folder, read_trees
from newllm_jax.training.manifest import Owner

TIMINGS = {"tokens_per_second", "seconds"}


@pytest.fixture(scope="session")
def config(small) -> NewLLMConfig:
    return load_config("baseline", small | {"num_epochs": 4})


def quiet(_: str) -> None:
    pass


def train(config, tmp_path, **options) -> newllm_jax.NewLLMResult:
    return train_newllm(config, run_root=tmp_path, narrate=quiet, **options)


def without_timings(results):
    return [{key: value for key, value in entry.items() if key not in TIMINGS} for entry in results["epochs"]]


def same_params(left: Path, right: Path) -> bool:
    left_run, right_run = newllm_jax.restore(left), newllm_jax.restore(right)
    pairs = zip(jax.tree.leaves(left_run.params), jax.tree.leaves(right_run.params), strict=True)
    return left_run.epoch == right_run.epoch and all((a == b).all() for a, b in pairs)


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory) -> newllm_jax.NewLLMResult:
    """Four epochs in one go, the first two of which are those of `small_run`."""
    result = train(config, tmp_path_factory.mktemp("whole"))
    assert result.results["best"]["epoch"] < 4  # or tests could not tell the best parameters from the last
    return result


@pytest.fixture
def half(small_run, tmp_path) -> Path:
    """Two epochs, in a copy that a test may change."""
    return Path(shutil.copytree(small_run, tmp_path / "half"))


def rewrite_config(run_dir: Path, **settings) -> None:
    """As if the run had been started with these settings."""
    stored = json.loads((run_dir / "config.json").read_text())
    stored["config"] |= settings
    (run_dir / "config.json").write_text(json.dumps(sealed(stored)))


@pytest.mark.quick
def test_extending_a_run_equals_training_in_one_go_bit_for_bit(half, whole):
    first = json.loads((half / "results.json").read_text())
    assert without_timings(first) == without_timings(whole.results)[:2]
    resumed = train_newllm(resume=half, overrides={"num_epochs": 4}, narrate=quiet)
    assert without_timings(resumed.results) == without_timings(whole.results)
    assert resumed.results["test"] == whole.results["test"]
    assert same_params(resumed.run_dir, whole.run_dir)
    lines = (half / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [entry["clip_norm"] for entry in resumed.results["epochs"]] == pytest.approx([0.01, 0.1, 0.1, 1.0])


@pytest.fixture
def fp16(config, fp16_on_a_cpu) -> NewLLMConfig:
    """Small enough to be compiled soon."""
    return config.override({"precision": "fp16", "num_layers": 1, "dropout": 0.0, "num_epochs": 2})


def test_fp16_skips_what_overflows_and_resumes_bit_for_bit(fp16, whole, tmp_path, monkeypatch):
    in_one_go = train(fp16, tmp_path)
    assert all(entry["skipped_updates"] for entry in in_one_go.results["epochs"])
    assert in_one_go.results["environment"]["precision"] == "fp16"
    assert not any("skipped_updates" in entry for entry in whole.results["epochs"])
    half = train(fp16.override({"num_epochs": 1}), tmp_path)
    copy = shutil.copytree(half.run_dir, tmp_path / "copy")
    with pytest.raises(InputError, match=r"precision: .* was trained with 'fp16', not 'fp32'; a new run can have that"):
        train_newllm(resume=half.run_dir, overrides={"precision": "fp32"}, narrate=quiet)
    resumed = train_newllm(resume=half.run_dir, overrides={"num_epochs": 2}, narrate=quiet)
    assert without_timings(resumed.results) == without_timings(in_one_go.results)
    assert same_params(resumed.run_dir, in_one_go.run_dir)

    latest = Checkpoints.latest

    def forgetting_the_scale(self, like, needed):
        found, damaged = latest(self, like, needed)
        state = dataclasses.replace(found.state, loss_scale=like.loss_scale)
        return dataclasses.replace(found, state=state), damaged

    monkeypatch.setattr(Checkpoints, "latest", forgetting_the_scale)
    resumed = train_newllm(resume=copy, overrides={"num_epochs": 2}, narrate=quiet)
    assert without_timings(resumed.results) != without_timings(in_one_go.results)


def test_fp16_does_not_skip_for_ever(fp16, tmp_path, monkeypatch):
    def broken(*arguments):
        return jax.tree.map(lambda leaf: leaf * jnp.nan, init_params(*arguments))

    monkeypatch.setattr(updates, "init_params", broken)
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**2)
    with pytest.raises(NumericalError, match="epoch 1: the loss of update 3 of 8 is not finite; there is no"):
        train(fp16, tmp_path)


def test_dry_run_plans_fp16_too(fp16):
    plan = plan_newllm(fp16)
    assert plan["environment"]["precision"] == "fp16"
    assert plan["estimated_memory_bytes"] > 0


def test_the_seed_and_the_clipping_borders_matter(config, whole, tmp_path):
    for change in ({"seed": 1}, {"clip_epochs": [2, 3]}, {"dropout": 0.0}):
        changed = train(config.override(change | {"num_epochs": 2}), tmp_path)
        assert without_timings(changed.results)[1] != without_timings(whole.results)[1], change


def test_a_stop_inside_an_epoch_costs_that_epoch_and_nothing_else(config, whole, tmp_path, monkeypatch):
    from newllm_jax.training import split

    epoch_order = split.epoch_order

    def interrupted(seed, epoch, examples):
        if epoch == 3:
            raise KeyboardInterrupt
        return epoch_order(seed, epoch, examples)

    monkeypatch.setattr(split, "epoch_order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    monkeypatch.undo()
    (run_dir,) = tmp_path.iterdir()
    assert not (run_dir / "results.json").exists()
    resumed = train_newllm(resume=run_dir, narrate=quiet)
    assert without_timings(resumed.results) == without_timings(whole.results)


def test_a_damaged_latest_checkpoint_is_passed_over(half, whole):
    for file in (half / "checkpoints" / "epoch_2" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    told: list[str] = []
    resumed = train_newllm(resume=half, overrides={"num_epochs": 4}, narrate=told.append)
    assert any("damaged" in line and "2" in line for line in told)
    assert without_timings(resumed.results) == without_timings(whole.results)


def test_resuming_a_run_without_a_checkpoint_starts_it(half, whole):
    shutil.rmtree(half / "checkpoints")
    (half / "results.json").unlink()
    resumed = train_newllm(resume=half, overrides={"num_epochs": 4}, narrate=quiet)
    assert without_timings(resumed.results) == without_timings(whole.results)


def test_early_stopping_ends_a_run_and_patience_lets_it_go_on(config, whole, tmp_path):
    stopped = train(config.override({"minimum_gain": 10.0, "patience": 1}), tmp_path)
    assert len(stopped.results["epochs"]) == 2
    assert "raise patience" in stopped.results["stopped"]
    told: list[str] = []
    again = train_newllm(resume=stopped.run_dir, overrides={"num_epochs": 9}, narrate=told.append)
    assert len(again.results["epochs"]) == 2
    assert any("raise patience" in line for line in told)
    longer = train_newllm(resume=stopped.run_dir, overrides={"patience": 2}, narrate=quiet)
    assert without_timings(longer.results) == without_timings(whole.results)[:3]


def test_a_schedule_whose_horizon_would_change_cannot_be_extended(config, half, tmp_path):
    rewrite_config(half, schedule="cosine")
    with pytest.raises(InputError, match="num_epochs: the learning rate of .* decays over its 2 epochs"):
        train_newllm(resume=half, overrides={"num_epochs": 4}, narrate=quiet)
    fixed = config.override({"schedule": "cosine", "decay_epochs": 4, "warmup_steps": 3})
    first = train(fixed.override({"num_epochs": 2}), tmp_path)
    resumed = train_newllm(resume=first.run_dir, overrides={"num_epochs": 4}, narrate=quiet)
    in_one_go = train(fixed, tmp_path)
    assert without_timings(resumed.results) == without_timings(in_one_go.results)
    rates = [entry["learning_rate"] for entry in resumed.results["epochs"]]
    assert rates[0] == 0
    assert rates[1] > rates[2] > rates[3] > 0


def test_resuming_as_another_experiment_is_refused(config, whole, tmp_path):
    with pytest.raises(InputError, match=r"learning_rate: .* was trained with 0.03, not 0.5"):
        train_newllm(resume=whole.run_dir, overrides={"learning_rate": 0.5}, narrate=quiet)
    other = tmp_path / "other.txt"
    other.write_text(Path(config.dataset).read_text() + "\nand a line more of six words")
    with pytest.raises(InputError, match="is not what the run was trained on"):
        train_newllm(resume=whole.run_dir, overrides={"dataset": str(other)}, narrate=quiet)
    moved = tmp_path / "moved.txt"
    shutil.copy(config.dataset, moved)
    again = train_newllm(resume=whole.run_dir, overrides={"dataset": str(moved)}, narrate=quiet)
    assert without_timings(again.results) == without_timings(whole.results)


def test_numbers_that_fail_keep_the_last_good_checkpoint(half, small_run):
    rewrite_config(half, learning_rate=1e30)
    with pytest.raises(NumericalError, match="epoch 3: .* not finite.*the checkpoint of epoch 2 is kept"):
        train_newllm(resume=half, overrides={"num_epochs": 4}, narrate=quiet)
    assert same_params(half, small_run)


def test_results_hold_the_contract(whole, config):
    results = json.loads((whole.run_dir / "results.json").read_text())
    assert results == json.loads(json.dumps(whole.results))
    assert {
        "schema_version", "system", "config", "command", "seconds", "peak_memory_bytes", "environment", "data",
        "parameters", "epochs", "best", "test",
    } <= results.keys()  # fmt: skip
    assert results["system"] == "new-llm"
    assert {
        "source", "fallback", "fingerprint", "train_texts", "validation_texts", "train_sequences",
        "validation_sequences", "test_sequences", "vocabulary_size", "steps_per_epoch",
    } <= results["data"].keys()  # fmt: skip
    assert set(results["epochs"][0]) == {
        "epoch", "train_loss", "val_loss", "val_ppl", "val_accuracy", "learning_rate", "clip_norm", "grad_norm",
        "tokens_per_second", "seconds",
    }  # fmt: skip
    assert set(results["best"]) == {"epoch", "val_loss", "val_ppl"}
    assert set(results["test"]) == {"loss", "ppl", "accuracy"}
    assert NewLLMConfig.from_dict(results["config"]) == config
    lowest = min(results["epochs"], key=lambda entry: entry["val_loss"])
    assert results["best"] == {key: lowest[key] for key in ("epoch", "val_loss", "val_ppl")}
    assert lowest["val_ppl"] == pytest.approx(np.exp(lowest["val_loss"]))
    assert {path.name for path in whole.run_dir.iterdir()} >= {
        "config.json", "metrics.jsonl", "results.json", "report.md", "report.html", "curves.png", "checkpoints",
    }  # fmt: skip


@pytest.mark.quick
def test_restore_gives_the_best_parameters_ready_to_call(whole, config):
    from newllm_jax.newllm.loss import next_word_loss
    from newllm_jax.newllm.wikitext import load_wikitext
    from newllm_jax.training.loop import evaluate
    from newllm_jax.training.split import Split
    from newllm_jax.training.step import make_evaluation

    run = newllm_jax.restore(whole.run_dir)
    validation = Split.from_arrays(load_wikitext(config).sequences["validation"])
    metrics = evaluate(make_evaluation(next_word_loss(run.model)), run.params, validation, 32)
    assert run.epoch == whole.results["best"]["epoch"]
    assert metrics["loss"] == pytest.approx(whole.results["best"]["val_loss"], rel=1e-6)
    logits, context = run.model.apply({"params": run.params}, jnp.array([run.tokenizer.encode("w1 w2")]))
    assert logits.shape == (1, 4, len(run.tokenizer))
    assert context.shape == (1, 8)


def test_dry_run_plans_what_a_run_measures(config, whole, tmp_path):
    plan = plan_newllm(config)
    assert plan["parameters"] == whole.results["parameters"]
    assert plan["data"] == whole.results["data"]
    assert plan["updates_per_epoch"] == whole.results["data"]["steps_per_epoch"]
    assert plan["updates"] == 4 * plan["updates_per_epoch"]
    right_after = train(config.override({"num_epochs": 1}), tmp_path)  # the peak is that of the process so far
    assert plan["estimated_memory_bytes"] == pytest.approx(right_after.results["peak_memory_bytes"], rel=0.3)


def test_evaluating_on_other_texts_is_refused(config, whole, tmp_path):
    from newllm_jax.systems import evaluate

    measured = evaluate(whole.run_dir)
    assert measured["test"] == whole.results["test"]
    assert measured["validation"]["loss"] == pytest.approx(whole.results["best"]["val_loss"], rel=1e-6)
    run_dir = tmp_path / "run"
    shutil.copytree(whole.run_dir, run_dir)
    other = tmp_path / "other.txt"
    other.write_text(Path(config.dataset).read_text() + "\nand a line more of six words")
    rewrite_config(run_dir, dataset=str(other))
    with pytest.raises(InputError, match="is not what the run was trained on"):
        evaluate(run_dir)


def test_a_run_stopped_between_its_last_epoch_and_its_results_gets_them(half, whole, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "results_footer", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_newllm(resume=half, overrides={"num_epochs": 4}, narrate=quiet)
    monkeypatch.undo()
    assert len(json.loads((half / "results.json").read_text())["epochs"]) == 2
    resumed = train_newllm(resume=half, overrides={"num_epochs": 4}, narrate=quiet)
    assert without_timings(resumed.results) == without_timings(whole.results)
    assert resumed.results["test"] == whole.results["test"]


def test_epochs_that_are_done_cannot_be_undone(whole):
    with pytest.raises(InputError, match="num_epochs: .* has 4 epochs already, not 3"):
        train_newllm(resume=whole.run_dir, overrides={"num_epochs": 3}, narrate=quiet)


OPTIONS = {
    "cell": "residual", "initialization": "he", "forget_bias": 1.0, "tie_embeddings": True, "weight_decay": 0.1,
    "ema_decay": 0.9, "num_layers": 2, **dict.fromkeys(DROPOUTS, 0.1),
}  # fmt: skip


@pytest.mark.quick
def test_a_run_with_every_option_resumes_bit_for_bit_and_gives_back_the_average(small, tmp_path):
    config = load_config("baseline", small | OPTIONS | {"num_epochs": 2, "sample_words": 6})
    whole = train(config, tmp_path)
    half = train(config.override({"num_epochs": 1}), tmp_path)
    resumed = train_newllm(resume=half.run_dir, overrides={"num_epochs": 2}, narrate=quiet)
    assert without_timings(resumed.results) == without_timings(whole.results)
    samples = whole.results["samples"]
    assert resumed.results["samples"] == samples
    assert [(sample["epoch"], sample["prompt"], len(sample["text"].split())) for sample in samples] == [
        (1, "", 6), (2, "", 6),
    ]  # fmt: skip
    assert samples[0]["text"] != samples[1]["text"] and samples[1]["text"] in (whole.run_dir / "report.md").read_text()
    best = whole.results["best"]
    run = newllm_jax.restore(whole.run_dir)
    assert run.epoch == best["epoch"]
    assert evaluate_run(whole.run_dir)["validation"]["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    directory = RunDir.open(whole.run_dir)
    folder, like = epoch_folder(directory.checkpoints, run.epoch), {"params": run.params}
    last = read_trees(folder, Owner(directory.run_id), run.epoch, like)[0]["params"]
    apart = jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), last, run.params)
    assert all(distance > 1e-6 for distance in jax.tree.leaves(apart))
