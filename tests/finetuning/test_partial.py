"""Runs that train a part: adapters on a pruned base, and last layers. All else is as in a run of the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import newllm_jax
from newllm_jax.config import FinetuneConfig
from newllm_jax.errors import InputError
from newllm_jax.finetuning.adaptation import choose_adaptation
from newllm_jax.finetuning.experiment import finetune
from newllm_jax.finetuning.loss import sequence_loss
from newllm_jax.finetuning.plan import plan_finetune
from newllm_jax.smollm.alpaca import load_alpaca
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.smollm.pretrained import load_smollm2
from newllm_jax.systems import evaluate, report
from newllm_jax.training.loop import evaluate as measure
from newllm_jax.training.split import Split
from newllm_jax.training.step import make_evaluation

KINDS = {
    "last": {"trained_layers": 2},
    "lora": {"adapter": "lora", "dropped_layers": [1, 2], "trained_layers": 2},  # of three, so that one lies below
}


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module", params=KINDS)
def config(request, deep):
    return deep.override(KINDS[request.param])


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run of three epochs, mirrored."""
    root = tmp_path_factory.mktemp("partial")
    return finetune(config.override({"mirror": str(root / "mirror")}), run_root=root / "runs", narrate=quiet)


def losses(results):
    return [(entry["train_loss"], entry["val_loss"]) for entry in results["epochs"]]


def test_results_tell_the_model_and_where_it_started(config, whole):
    results = json.loads((whole.run_dir / "results.json").read_text())
    adaptation = choose_adaptation(config, load_smollm2(config.base_model).model.config)
    assert results["base"]["layers"] == 4 and results["base"]["parameters"] == 11_936
    assert adaptation.results().items() <= results.items()
    assert results["best"]["val_loss"] < results["start"]["val_loss"]
    assert (results["start"]["val_loss"] == results["base"]["val_loss"]) == (not config.dropped_layers)
    text = report(whole.run_dir)
    told = {
        "lora": "3 layers, 9,984 parameters (layers 1 to 1 of the base left out); trained: 1,392 parameters of LoRA "
        "adapters, rank 3, on the last 2 layers",
        "none": "4 layers, 11,936 parameters; trained: 3,920 of them, the last 2 layers and the final norm",
    }
    assert told[config.adapter] in text
    assert ("of the model at the start" in text) == bool(config.dropped_layers)


def test_the_loss_of_the_base_is_that_of_all_its_layers(config, whole):
    base = load_smollm2(config.base_model)
    validation = Split.from_arrays(load_alpaca(base.tokenizer, config).validation)
    for adaptation, what in ((choose_adaptation(FinetuneConfig(), base.model.config), "base"),
                             (choose_adaptation(config, base.model.config), "start")):  # fmt: skip
        evaluation, params = make_evaluation(sequence_loss(SmolLM2(adaptation.llama))), adaptation.prune(base.params)
        measured = measure(evaluation, params, validation, 4)
        assert whole.results[what]["val_loss"] == pytest.approx(measured["loss"], rel=1e-6)


def test_dry_run_plans_what_a_run_measures(config, whole):
    plan = plan_finetune(config)
    for name in ("layers", "parameters", "trained_parameters", "data"):
        assert plan[name] == whole.results[name]
    for name in ("layers", "parameters"):
        assert plan["base"][name] == whole.results["base"][name]
    assert plan["estimated_memory_bytes"] == pytest.approx(whole.results["peak_memory_bytes"], rel=0.3)


def test_extending_equals_one_go(config, whole, tmp_path):
    short = finetune(config.override({"num_epochs": 1}), run_root=tmp_path, narrate=quiet)
    resumed = finetune(resume=short.run_dir, overrides={"num_epochs": 3}, narrate=quiet)
    assert losses(resumed.results) == losses(whole.results)
    one, other = (newllm_jax.restore(run.run_dir).base.params for run in (resumed, whole))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, other)))
    assert resumed.results["start"] == whole.results["start"]
    for name in ("adapter", "rank", "trained_layers", "dropped_layers"):
        value = {"adapter": "lora" if config.adapter == "none" else "none", "dropped_layers": [2, 3]}.get(name, 1)
        with pytest.raises(InputError, match=rf"{name}: .* was trained with .*; a new run can have that"):
            finetune(resume=short.run_dir, overrides={name: value}, narrate=quiet)


def test_the_restored_model_is_that_of_the_run(config, whole):
    run, base = newllm_jax.restore(whole.run_dir), load_smollm2(config.base_model)
    kept = [0, 2, 3] if config.dropped_layers else [0, 1, 2, 3]
    assert run.base.model.config.num_layers == len(kept)
    ours, before = run.base.params, base.params
    for one, other in zip(*(jax.tree.leaves(tree["backbone"]["blocks"]) for tree in (ours, before)), strict=True):
        same = [bool((one[number] == other[layer]).all()) for number, layer in enumerate(kept)]
        is_frozen = config.adapter == "lora" and one.ndim == 2  # norms have no adapters
        assert same == [True] * (len(kept) - 2) + [is_frozen] * 2
    np.testing.assert_array_equal(ours["embed"]["embedding"], before["embed"]["embedding"])
    assert (ours["backbone"]["norm"]["scale"] == before["backbone"]["norm"]["scale"]).all() == (
        config.adapter == "lora"
    )
    again = evaluate(whole.run_dir)
    assert again["validation"]["loss"] == pytest.approx(whole.results["best"]["val_loss"], rel=1e-6)
    assert isinstance("".join(newllm_jax.generate(run, "Count", max_words=5)), str)


def test_only_what_is_trained_is_in_checkpoints(config, whole):
    trained = whole.results["trained_parameters"]
    for checkpoint in (whole.run_dir / "checkpoints").glob("epoch_*"):
        arrays = json.loads((checkpoint / "manifest" / "metadata").read_text())["arrays"]
        sizes = {
            name: sum(int(np.prod(entry["shape"])) for entry in entries.values()) for name, entries in arrays.items()
        }
        assert sizes["params"] == trained
        assert 2 * trained <= sizes["opt_state"] <= 2 * trained + 4  # two moments and counts


def test_a_run_needs_its_own_base(config, whole, monkeypatch, tmp_path):
    other = Path(shutil.copytree(config.base_model, tmp_path / "other"))
    values = load_file(other / "model.safetensors")
    save_file({**values, "model.norm.weight": values["model.norm.weight"] + 1}, other / "model.safetensors")
    changed = {"base_model": str(other), "mirror": whole.results["config"]["mirror"]}
    with pytest.raises(InputError, match="base_model: .* is not what the run was trained on"):
        finetune(resume=whole.run_dir, overrides=changed, narrate=quiet)
    monkeypatch.setattr("newllm_jax.finetuning.run.load_base", lambda _: load_smollm2(str(other)))
    with pytest.raises(InputError, match="base_model: .* is not what the run was trained on"):
        newllm_jax.restore(whole.run_dir)


def test_a_finished_run_has_its_best_adapters_as_a_folder(config, whole):
    folder = whole.run_dir / "adapter"
    if config.adapter == "none":
        assert not folder.exists()
        return
    tensors, run = load_file(folder / "adapter_model.safetensors"), newllm_jax.restore(whole.run_dir)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["layers_to_transform"]) == (3, 6, [1, 2])
    assert settings["base_model_name_or_path"] is None  # no source has it without layers
    base = choose_adaptation(config, load_smollm2(config.base_model).model.config)
    before = base.prune(load_smollm2(config.base_model).params)["backbone"]["blocks"]["mlp"]["up_proj"]["kernel"]
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_{}.weight"
    change = 2 * (tensors[name.format("B")] @ tensors[name.format("A")]).T
    merged = run.base.params["backbone"]["blocks"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(merged[2], before[2] + change, rtol=1e-5, atol=1e-6)
    copy = Path(whole.results["config"]["mirror"]) / whole.run_dir.name / "adapter"
    for file in folder.iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()
    assert len(list(copy.iterdir())) == 2


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--dropped_layers=2,5"], "dropped_layers: must be within the 4 layers of the base, not (2, 5)"),
        (["--dropped_layers=0,4"], "dropped_layers: must be fewer than the 4 layers of the base, not (0, 4)"),
        (["--dropped_layers=3,1"], "dropped_layers: must be empty, or the first layer that is left out and a larger"),
        (["--trained_layers=5"], "trained_layers: must be at most 4, the layers of the model, or none, not 5"),
        (["--adapter=lora", "--rank=0"], "rank: must be from 1 to 1024, not 0"),
        (["--adapter=lore"], "adapter: must be one of none, lora, not 'lore'"),
    ],
)
def test_bad_settings_end_in_one_line(refused, deep, in_an_empty_folder, tmp_path, typed, message):
    names = "base_model", "dataset", "train_chunks", "validation_chunks"
    sources = [f"--{name}={getattr(deep, name)}" for name in names]
    for dry_run in ([], ["--dry_run"]):
        assert message in refused("finetune", *sources, *typed, *dry_run)
    assert list(tmp_path.iterdir()) == []
