"""A fine-tuned SmolLM2 restored from disk, measured again, and made to write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from newllm_jax.config import FinetuneConfig
from newllm_jax.decoding.batches import Batches
from newllm_jax.decoding.exits import Exits
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.finetuning.adaptation import choose_adaptation
from newllm_jax.finetuning.loss import sequence_loss
from newllm_jax.records.directory import RunDir
from newllm_jax.records.exported import exported_value, is_exported, open_trained
from newllm_jax.records.results import check_fingerprints, stored_fingerprints
from newllm_jax.records.stored_config import stored_config
from newllm_jax.smollm.adapter_file import read_adapter
from newllm_jax.smollm.alpaca import load_alpaca
from newllm_jax.smollm.base import fingerprints, load_base
from newllm_jax.smollm.fused_decoder import slow_text_warning
from newllm_jax.smollm.generate import generate_answers, generate_tokens, prompt_ids, stream_text
from newllm_jax.smollm.generate import in_precision as in_precision
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.smollm.pretrained import Pretrained, load_folder
from newllm_jax.training.loop import evaluate
from newllm_jax.training.manifest import Owner
from newllm_jax.training.split import Split
from newllm_jax.training.step import make_evaluation

Kind = Literal["model", "adapter"]  # of what is exported


@dataclass(frozen=True)
class FinetuneRun:
    """A fine-tuned model, ready to call: `run.base.model.apply({"params": run.base.params}, ids)`.

    Attributes:
      base: the model, its best parameters and its tokenizer; adapters are merged, and dropped layers left out.
      config: of the run.
      epoch: the epoch that the parameters are from.
      run: its directory.
    """

    base: Pretrained
    config: FinetuneConfig
    epoch: int
    run: RunDir


def restore_finetune(run_dir: str | Path) -> FinetuneRun:
    """The best parameters of a fine-tuned model, on the default device. Changes nothing on disk.

    Args:
      run_dir: a run directory or an exported folder; one with a whole model needs no base.

    Raises:
      InputError: not a fine-tuning run, one without a checkpoint, an exported folder that is damaged, or a base that
        cannot be had (its tokenizer, and what of it is frozen) or is another than the run's.
    """
    from newllm_jax.training.checkpoint import read_chosen

    run = open_trained(run_dir)
    exported, config = is_exported(run), stored_config(run, FinetuneConfig)
    if exported and exported_value(run, "kind", Kind) == "model":
        base = load_folder(run.path, config.base_model, stored_fingerprints(run).get("base", ""))
        return FinetuneRun(base, config, exported_value(run, "epoch", int), run)
    base = load_base(config)
    adaptation = choose_adaptation(config, base.model.config)
    _, shapes = adaptation.shapes()
    if exported:
        epoch = exported_value(run, "epoch", int)
        trained = read_adapter(run.path, shapes, adaptation.llama.num_layers)
    else:
        epoch, trained, _ = read_chosen(run.checkpoints, Owner(run.run_id), shapes)
    frozen = adaptation.freeze(adaptation.prune(base.params))
    if frozen:
        check_fingerprints(run, fingerprints(base))
    model, params = SmolLM2(adaptation.llama), adaptation.merge(frozen, trained)
    return FinetuneRun(Pretrained(model, params, base.tokenizer, base.source), config, epoch, run)


def evaluate_run(run_dir: str | Path) -> dict[str, Any]:
    """Loss, perplexity and accuracy of a run's best parameters on its validation chunks, strict float32."""
    run = restore_finetune(run_dir)
    data = load_alpaca(run.base.tokenizer, run.config)
    check_fingerprints(run.run, fingerprints(run.base, data))
    evaluation = make_evaluation(sequence_loss(run.base.model))
    validation = Split.from_arrays(data.validation)
    return {"validation": evaluate(evaluation, run.base.params, validation, run.config.examples_at_once)}


def slow_generation_warning(config: FinetuneConfig) -> str:
    """Why texts of SmolLM2-135M are made without its GPU kernel; no configuration says how large its base is."""
    return slow_text_warning(SmolLM2(LlamaConfig()))


def generate(
    run: FinetuneRun,
    prompt: str,
    *,
    max_words: int = 100,
    seed: int = 0,
    sampling: Sampling | None = None,
    exits: Exits | None = None,
) -> Iterator[str]:
    """Streams the answer to a prompt; arguments and errors of `generation.generate`. The model has no exits."""
    ids = prompt_ids(run.base.tokenizer, prompt)
    return stream_text(run.base.tokenizer, generate_tokens(run.base, ids, max_words, sampling or Sampling(), seed))


def generate_all(run: FinetuneRun, prompts: Sequence[str], asked: Batches) -> list[str]:
    """The answer to each of many prompts; errors of `generation.generate_all`."""
    return generate_answers(run.base, prompts, asked)
