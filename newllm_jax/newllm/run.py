"""A trained New-LLM: its initial parameters, and a run's best ones restored from disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.bars import progress_bar
from newllm_jax.config import NewLLMConfig, check
from newllm_jax.newllm.loss import next_word_loss
from newllm_jax.newllm.model import DROPOUTS, ContextVectorLM, check_dropouts
from newllm_jax.newllm.tokenizer import WordTokenizer
from newllm_jax.newllm.wikitext import load_wikitext
from newllm_jax.records.directory import RunDir
from newllm_jax.records.exported import TENSORS, exported_value, is_exported, open_trained, write_description
from newllm_jax.records.results import check_fingerprints, stored_fingerprints
from newllm_jax.records.stored_config import stored_config
from newllm_jax.records.tensor_file import read_tree, write_tree
from newllm_jax.training.loop import evaluate
from newllm_jax.training.manifest import Owner
from newllm_jax.training.step import Params, make_evaluation

VOCABULARY = "vocabulary.json"


@dataclass(frozen=True)
class NewLLMRun:
    """A trained model, ready to call: `run.model.apply({"params": run.params}, ids, context)`.

    Attributes:
      model, params: the model and its best parameters.
      config, tokenizer: of the run.
      epoch: the epoch that the parameters are from.
      fingerprint: of the texts that it was trained on.
    """

    model: ContextVectorLM
    params: Params
    config: NewLLMConfig
    tokenizer: WordTokenizer
    epoch: int
    fingerprint: str


def init_params(model: ContextVectorLM, seed: int) -> Params:
    """The initial parameters of a seed."""
    check_dropouts(model)
    without_dropout = model.clone(**dict.fromkeys(DROPOUTS, 0.0))  # which changes none, and the program is the same
    return _init(without_dropout, jax.random.key(seed))


@partial(jax.jit, static_argnums=0)
def _init(model: ContextVectorLM, key: jax.Array) -> Params:
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def restore_newllm(run_dir: str | Path) -> NewLLMRun:
    """The best parameters of a run and its model (strict float32), on the default device. Changes nothing on disk.

    Args:
      run_dir: a run directory or an exported folder.

    Raises:
      InputError: not a New-LLM run, or one without a checkpoint that can be read; an exported folder that is damaged.
    """
    from newllm_jax.training.checkpoint import read_chosen

    run = open_trained(run_dir)
    exported, config = is_exported(run), stored_config(run, NewLLMConfig)
    tokenizer = WordTokenizer.from_json(run.read_json(VOCABULARY), run.path / VOCABULARY, config.lower_case)
    model = ContextVectorLM.from_config(config, len(tokenizer))
    like = jax.eval_shape(lambda: init_params(model, config.seed))
    if exported:
        epoch, record = exported_value(run, "epoch", int), dict[str, Any]()
        params: Params = jax.device_put(read_tree(run.path / TENSORS, like))
    else:
        epoch, params, record = read_chosen(run.checkpoints, Owner(run.run_id), like)
    fingerprint = stored_fingerprints(run, before_0_2(record)).get("data", "")
    return NewLLMRun(model, params, config, tokenizer, epoch, fingerprint)


def export_newllm(trained: NewLLMRun, run: RunDir, folder: Path) -> None:
    """Writes `model.safetensors`, `vocabulary.json` and `newllm.json` into an empty folder.

    Args:
      run: the directory that `trained` was restored from.
    """
    write_tree(folder / TENSORS, trained.params)
    RunDir(folder, {}).write_json(VOCABULARY, list(trained.tokenizer.words))
    write_description(folder, run, {"data": trained.fingerprint}, {"epoch": trained.epoch})


def before_0_2(record: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprints of a run of version 0.1.0, which stored them in its checkpoints; {} for another's record."""
    return {"data": record["fingerprint"]} if "fingerprint" in record else {}


def evaluate_run(run_dir: str | Path, dynamic: bool = False) -> dict[str, Any]:
    """Loss, perplexity and accuracy of a run's best parameters on the validation and test splits, strict float32.

    Args:
      dynamic: also measures the model while it goes on learning (`newllm.dynamic`); for text as a stream.

    Raises:
      InputError: the data at hand are not those that the run was trained on, or are no stream.
    """
    from newllm_jax.newllm.dynamic import evaluate_dynamically

    run = restore_newllm(run_dir)
    check("text", run.config.text, "stream, in which each word follows the one before, for a dynamic evaluation",
          run.config.text == "stream" or not dynamic)  # fmt: skip
    data = load_wikitext(run.config)
    check_fingerprints(open_trained(run_dir), data.fingerprints(), {"data": run.fingerprint})
    loss = next_word_loss(run.model)
    evaluation = make_evaluation(loss)
    found = dict[str, Any]()
    with progress_bar("evaluation", 2 + dynamic) as advance:
        for name in ("validation", "test"):
            found[name] = evaluate(evaluation, run.params, data.split(name, run.config), run.config.examples_at_once)
            advance(1)
        if dynamic:
            found["dynamic"] = evaluate_dynamically(loss, run.params, data, run.config)
    return found
