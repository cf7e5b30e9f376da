"""A fine-tuned SmolLM2 as a folder that `transformers` loads, or its adapters as one that `peft` does."""

from __future__ import annotations

import json
from pathlib import Path

from newllm_jax.errors import InputError
from newllm_jax.files import whole_file
from newllm_jax.finetuning.adaptation import choose_adaptation
from newllm_jax.finetuning.run import FinetuneRun, Kind
from newllm_jax.records.directory import RunDir
from newllm_jax.records.exported import write_description
from newllm_jax.records.results import stored_fingerprints
from newllm_jax.smollm.adapter_file import save_adapter
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.smollm.weights import save_model
from newllm_jax.training.manifest import Owner


def export_finetune(trained: FinetuneRun, run: RunDir, folder: Path, merge: bool = False) -> None:
    """Writes the model with its tokenizer and `newllm.json` into an empty folder; LoRA adapters without their base.

    Args:
      run: the directory that `trained` was restored from.
      merge: writes a model that has its adapters added to its weights, instead of the adapters.

    Raises:
      InputError: there is nothing to merge; or adapters are for a base without some layers, which no source has.
    """
    has_adapters = trained.config.adapter == "lora"
    if merge and not has_adapters:
        raise InputError(f"merge: {run.path} has no adapters, its weights are exported as they are; leave it out")
    if has_adapters and not merge:
        _write_adapter(trained, run, folder)
    else:
        save_model(folder, trained.base.model.config, trained.base.params)
        _write_generation_config(folder, trained.base)
    trained.base.tokenizer.save(folder)
    kind: Kind = "adapter" if has_adapters and not merge else "model"
    write_description(folder, run, stored_fingerprints(run), {"kind": kind, "epoch": trained.epoch})


def _write_adapter(trained: FinetuneRun, run: RunDir, folder: Path) -> None:
    from newllm_jax.training.checkpoint import read_chosen

    if trained.config.dropped_layers:
        raise InputError(f"merge: {run.path} leaves layers of its base out, so that its adapters fit no base that "
                         "anyone has; --merge writes the whole model")  # fmt: skip
    llama = trained.base.model.config
    _, shapes = choose_adaptation(trained.config, llama).shapes()
    _, adapters, _ = read_chosen(run.checkpoints, Owner(run.run_id), shapes)
    save_adapter(folder, adapters, trained.base.source.model_name, llama.num_layers)


def _write_generation_config(folder: Path, base: Pretrained) -> None:
    """Where a text ends, for `generate` of transformers, and that it samples like `newllm generate`."""
    settings = {**base.tokenizer.special_ids, "do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
    with whole_file(folder / "generation_config.json") as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
