"""Fine-tuning of a whole model: all of it moves, resuming changes nothing, the results hold the contract."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import newllm_jax
from newllm_jax.config import FinetuneConfig
from newllm_jax.errors import InputError
from newllm_jax.finetuning.experiment import QUESTION, finetune
from newllm_jax.finetuning.loss import sequence_loss
from newllm_jax.finetuning.plan import plan_finetune
from newllm_jax.smollm.pretrained import load_smollm2
from newllm_jax.systems import evaluate
from newllm_jax.training.precision import PRECISIONS


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def config(tiny_base, tiny_rows) -> FinetuneConfig:
    return FinetuneConfig(
        base_model=tiny_base, dataset=tiny_rows, train_chunks=9, validation_chunks=3, batch_size=4, num_epochs=4,
        learning_rate=0.3, sample_words=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    result = finetune(config, run_root=tmp_path_factory.mktemp("finetune"), narrate=quiet)
    assert result.results["best"]["epoch"] < 4  # or tests could not tell the best parameters from the last
    return result


def losses(results):
    return [(entry["train_loss"], entry["val_loss"]) for entry in results["epochs"]]


def test_published_settings():
    config = FinetuneConfig()
    assert config.base_model == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert (config.batch_size, config.learning_rate, config.num_epochs, config.patience) == (16, 1e-5, 10, 3)
    assert (config.train_chunks, config.validation_chunks) == (1000, 100)


def test_results_hold_the_contract(config, whole):
    results = json.loads((whole.run_dir / "results.json").read_text())
    assert results["system"] == "finetune"
    assert {"parameters", "trained_parameters", "data", "epochs", "best", "last", "base", "config"} <= results.keys()
    assert results["parameters"] == results["trained_parameters"] == 8032
    assert results["best"]["val_ppl"] < results["base"]["val_ppl"]
    assert FinetuneConfig.from_dict(results["config"]) == config
    assert (whole.run_dir / "report.md").is_file()
    assert (whole.run_dir / "curves.png").is_file()


def test_all_parameters_are_trained_and_the_base_is_left_alone(config, whole):
    base, tuned = load_smollm2(config.base_model), newllm_jax.restore(whole.run_dir)
    assert tuned.epoch == whole.results["best"]["epoch"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), base.params, tuned.base.params)
    assert all(jax.tree.leaves(changed))


def test_the_loss_is_that_of_whole_sequences(config):
    base = load_smollm2(config.base_model)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 257, (3, 129)), jnp.int32)
    logits, _ = jax.jit(base.model.apply)({"params": base.params}, ids[:, :-1])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    sums, _ = jax.jit(sequence_loss(base.model))(base.params, ids, jnp.array([True, False, True]), None, None)
    assert int(sums.count) == 256
    assert float(sums.loss) == pytest.approx(float(expected[0].sum() + expected[2].sum()), rel=1e-6)


def test_dry_run_plans_what_a_run_measures(config, whole):
    plan = plan_finetune(config)
    for name in ("parameters", "data"):
        assert plan[name] == whole.results[name]
    assert (plan["updates_per_epoch"], plan["updates"]) == (3, 12)
    assert plan["estimated_memory_bytes"] == pytest.approx(whole.results["peak_memory_bytes"], rel=0.3)


def test_a_micro_batch_gives_the_same_run_but_for_rounding_and_may_change(config, whole, tmp_path):
    micro = finetune(config.override({"micro_batch": 3, "num_epochs": 1}), run_root=tmp_path, narrate=quiet)
    assert losses(micro.results) == [pytest.approx(epoch, rel=1e-4) for epoch in losses(whole.results)[:1]]
    assert micro.results["config"]["micro_batch"] == 3
    resumed = finetune(resume=micro.run_dir, overrides={"micro_batch": None, "num_epochs": 2}, narrate=quiet)
    assert losses(resumed.results) == [pytest.approx(epoch, rel=1e-3) for epoch in losses(whole.results)[:2]]


def test_extending_equals_one_go(config, whole, tmp_path):
    short = finetune(config.override({"num_epochs": 1}), run_root=tmp_path, narrate=quiet)
    resumed = finetune(resume=short.run_dir, overrides={"num_epochs": 4}, narrate=quiet)
    assert losses(resumed.results) == losses(whole.results)
    samples = whole.results["samples"]
    assert resumed.results["samples"] == samples
    assert [samples[0]["epoch"], samples[-1]["epoch"], len(samples)] == [1, 4, 3]
    assert {sample["prompt"] for sample in samples} == {QUESTION}
    assert len({sample["text"] for sample in samples}) > 1
    with pytest.raises(InputError, match=r"learning_rate: .* was trained with 0.3, not 0.5"):
        finetune(resume=short.run_dir, overrides={"learning_rate": 0.5}, narrate=quiet)
    before = (short.run_dir / "config.json").read_text()
    with pytest.raises(InputError, match=r"num_epochs: .* has 4 epochs already, not 3"):
        finetune(resume=short.run_dir, overrides={"num_epochs": 3}, narrate=quiet)
    assert (short.run_dir / "config.json").read_text() == before


def test_fp16_skips_what_overflows_and_resumes_bit_for_bit(config, tmp_path, fp16_on_a_cpu):
    fp16 = config.override({"precision": "fp16", "num_epochs": 2, "learning_rate": 1e-2})
    in_one_go = finetune(fp16, run_root=tmp_path, narrate=quiet)
    assert in_one_go.results["epochs"][0]["skipped_updates"]
    short = finetune(fp16.override({"num_epochs": 1}), run_root=tmp_path, narrate=quiet)
    resumed = finetune(resume=short.run_dir, overrides={"num_epochs": 2}, narrate=quiet)
    assert losses(resumed.results) == losses(in_one_go.results)


@pytest.mark.quick
def test_every_product_is_in_the_precision_asked_for(config, products):
    base = load_smollm2(config.base_model)
    ids, present = jnp.zeros((2, 129), jnp.int32), jnp.ones(2, bool)
    for name in PRECISIONS:
        loss = sequence_loss(base.model.clone(precision=name))
        found = products(
            jax.grad(lambda params, loss=loss: loss(params, ids, present, None, None)[0].loss), base.params
        )
        assert len(found) == 3 * (7 + 2 + 1)  # projections, attention, head; and the gradients by both factors
        assert set(found) == {name}


def test_evaluate_and_generate(whole):
    again = evaluate(whole.run_dir)
    assert again["validation"]["loss"] == pytest.approx(whole.results["best"]["val_loss"], rel=1e-6)
    run = newllm_jax.restore(whole.run_dir)
    assert isinstance("".join(newllm_jax.generate(run, "Count", max_words=5)), str)
