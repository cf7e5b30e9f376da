"""Exported models: what a folder holds, that it is the run again, whole or not there, and where it is found."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace

import huggingface_hub
import jax
import numpy as np
import pytest

import newllm_jax
from newllm_jax.config import FinetuneConfig
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.errors import InputError
from newllm_jax.newllm import run as newllm_run
from newllm_jax.sources import hub
from newllm_jax.systems import evaluate, export, restore

GREEDY = Sampling(temperature=0)


def leaves(run):
    """All arrays of a restored run."""
    parts = (getattr(run, name, None) for name in ("params", "stages", "base", "trained", "routing"))
    found = [vars(part).values() if hasattr(part, "__dict__") else [part] for part in parts]
    found += [vars(each).values() for each in getattr(run, "stages", ())]
    return [leaf for part in found for each in part for leaf in jax.tree.leaves(each) if hasattr(leaf, "shape")]


def assert_same(one, other):
    assert len(leaves(one)) == len(leaves(other)) > 0
    for each, again in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(each, again)


@pytest.fixture
def folder(exported_run, tmp_path):
    return shutil.copytree(exported_run, tmp_path / "folder")


@pytest.mark.quick
def test_a_new_llm_is_the_run_again(small_run, exported_run):
    assert sorted(path.name for path in exported_run.iterdir()) == [
        "README.md", "model.safetensors", "newllm.json", "vocabulary.json"
    ]  # fmt: skip
    run, again = restore(small_run), restore(exported_run)
    assert_same(run, again)
    assert (run.config, run.tokenizer, run.epoch, run.fingerprint, run.model) == (
        again.config, again.tokenizer, again.epoch, again.fingerprint, again.model
    )  # fmt: skip
    texts = [list(newllm_jax.generate(each, "w1", max_words=5, sampling=GREEDY)) for each in (run, again)]
    assert texts[0] == texts[1] != []
    assert evaluate(exported_run) == evaluate(small_run)


def test_the_hub_is_asked_for_a_name_and_a_revision(exported_run, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, **options):
        asked.append(
            (repository, options["revision"], options["repo_type"], "*.safetensors" in options["allow_patterns"])
        )
        return str(exported_run)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    restore("someone/model")
    restore("someone/model@v1.0")
    assert asked == [("someone/model", None, "model", True), ("someone/model", "v1.0", "model", True)]
    (tmp_path / "someone").mkdir()
    with pytest.raises(InputError, match="someone/model: no such run directory"):
        restore("someone/model")  # the place is here
    shutil.copytree(exported_run, tmp_path / "someone" / "model")
    restore("someone/model")
    assert len(asked) == 2


def test_a_name_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for offline in True, False:
        monkeypatch.setattr(hub, "hub_is_offline", lambda offline=offline: offline)
        monkeypatch.setattr(hub, "hub_answers", lambda: False)
        with pytest.raises(InputError, match="someone/model: no such run directory or exported folder; model 'someone"):
            restore("someone/model")


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more_leaves_nothing(small_run, tmp_path, monkeypatch, refused, fault):
    def write_tree(file, tree):
        file.write_text("half")
        raise OSError(fault, os.strerror(fault), str(file))

    monkeypatch.setattr(newllm_run, "write_tree", write_tree)
    said = refused("export", small_run, "--to", tmp_path / "new")
    assert "model.safetensors" in said and "make room or choose another place" in said
    assert list(tmp_path.iterdir()) == []


def test_the_command(newllm, small_run, tmp_path):
    code, out, _ = newllm("export", small_run, "--to", tmp_path / "new")
    assert (code, out) == (0, f"exported to {tmp_path / 'new'}\n")
    code, out, _ = newllm("generate", tmp_path / "new", "--prompt=w1", "--max_words=3")
    assert code == 0 and out.startswith("w1 ")


def test_a_private_folder_is_not_told(small_run, exported_run):
    description = json.loads((exported_run / "newllm.json").read_text())
    assert description["config"]["mirror"] == ""
    card = (exported_run / "README.md").read_text()
    assert str(small_run.parent) not in card
    assert "corpus.txt" in card and f"{json.loads((small_run / 'results.json').read_text())['parameters']:,}" in card


def test_the_card_may_be_edited_and_nothing_else(folder):
    (folder / "README.md").write_text("mine")
    restore(folder)
    vocabulary = folder / "vocabulary.json"
    vocabulary.write_text(vocabulary.read_text().replace("w1", "v1"))
    with pytest.raises(InputError, match="vocabulary.json: damaged, or changed after it was exported"):
        restore(folder)


# SmolLM2s: the same folder serves all tests of its kind.

LORA = {"adapter": "lora", "rank": 2, "trained_layers": 1}


@pytest.fixture(scope="module")
def finetuned(tiny_base, tiny_rows, tmp_path_factory):
    """Runs by what is trained: everything, or adapters."""
    root, runs = tmp_path_factory.mktemp("finetuned"), {}
    for name, settings in {"all": {}, "lora": LORA}.items():
        config = FinetuneConfig(base_model=tiny_base, dataset=tiny_rows, train_chunks=8, validation_chunks=3,
                                batch_size=4, num_epochs=1, learning_rate=0.03, **settings)  # fmt: skip
        runs[name] = newllm_jax.finetune(config, name=name, run_root=root, narrate=str).run_dir
    return runs


@pytest.mark.parametrize(("name", "merge"), [("all", False), ("lora", True), ("lora", False)])
def test_a_finetuned_model_is_the_run_again(finetuned, tmp_path, name, merge):
    folder = export(finetuned[name], tmp_path / "new", merge=merge)
    is_adapter = name == "lora" and not merge
    assert (folder / "adapter_model.safetensors").exists() == is_adapter != (folder / "config.json").exists()
    run, again = restore(finetuned[name]), restore(folder)
    assert_same(run, again)
    assert (run.base.model, run.epoch) == (again.base.model, again.epoch)
    if name == "lora":
        assert evaluate(folder) == evaluate(finetuned[name])


def test_transformers_reads_tokenizer_and_settings(finetuned, tmp_path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = export(finetuned["all"], tmp_path / "new")
    ours, theirs = restore(folder).base.tokenizer, AutoTokenizer.from_pretrained(folder)
    text, turns = "Count 123  a\n\nδ don't<|im_end|>", [{"role": "user", "content": "Hello"}]
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode("a , b"), skip_special_tokens=True) == ours.decode(ours.encode("a , b"))
    assert theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == ours.chat(turns)
    settings, sampling = GenerationConfig.from_pretrained(folder), Sampling()
    assert settings.eos_token_id == theirs.eos_token_id == ours.eos_id
    assert (settings.temperature, settings.top_p) == (sampling.temperature, sampling.top_p)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 2


@pytest.mark.parametrize("merge", [True, False])
def test_transformers_and_peft_compute_the_same(finetuned, tmp_path, merge):
    torch = pytest.importorskip("torch", reason="torch is not installed; the golden files stand for it")
    peft = pytest.importorskip("peft", reason="peft is not installed; its golden file stands for it")
    from transformers import AutoModelForCausalLM

    folder = export(finetuned["lora"], tmp_path / "new", merge=merge)
    run = restore(folder)
    tokenizer = run.base.tokenizer
    ids = np.array([tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Hello alpha"}]))])
    ours, _ = run.base.model.apply({"params": run.base.params}, ids)
    model = (AutoModelForCausalLM if merge else peft.AutoPeftModelForCausalLM).from_pretrained(str(folder))
    with torch.no_grad():
        np.testing.assert_allclose(model.float()(torch.from_numpy(ids)).logits.numpy(), ours, rtol=1e-4, atol=1e-4)
        chosen = model.generate(input_ids=torch.from_numpy(ids), max_new_tokens=8, do_sample=False)[0, ids.size :]
    text = "".join(newllm_jax.generate(run, "Hello alpha", max_words=8, sampling=GREEDY))
    assert text == tokenizer.decode(chosen.tolist()) != ""


def test_an_exported_model_has_the_tensors_of_transformers(golden, tmp_path, finetuned):
    """By name and value those that `golden_llama.npz` was made from."""
    from safetensors.numpy import load_file

    from newllm_jax.finetuning.export import export_finetune
    from newllm_jax.records.directory import RunDir

    run = restore(finetuned["all"])
    base = replace(run.base, model=golden.model, params=golden.params)
    export_finetune(replace(run, base=base), RunDir.open(finetuned["all"]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == golden.tensors.keys()
    for name, values in golden.tensors.items():
        np.testing.assert_array_equal(tensors[name], values)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert {key: settings[key] for key in golden.settings} == golden.settings


def test_what_there_is_not_to_merge(finetuned, small_run, refused, tmp_path):
    new = tmp_path / "new"
    assert refused("export", finetuned["all"], "--to", new, "--merge").startswith("merge: ")
    assert refused("export", small_run, "--to", new, "--merge").startswith("merge: is for runs of finetune")
    assert not new.exists()
