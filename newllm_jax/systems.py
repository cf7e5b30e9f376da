"""Any run directory, whichever system it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm_jax.decoding.sampling import Sampling
from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir

if TYPE_CHECKING:
    from newllm_jax.cascade.generate import Exits
    from newllm_jax.cascade.run import CascadeRun
    from newllm_jax.finetuning.experiment import FinetuneRun
    from newllm_jax.newllm.run import NewLLMRun


def restore(run_dir: str | Path) -> NewLLMRun | CascadeRun | FinetuneRun:
    """The trained model of a run directory, ready to call, on the default device (a CPU will do).

    Raises:
      InputError: not a run directory, or one without a checkpoint.
    """
    return _restorer(run_dir)(run_dir)


def _restorer(run_dir: str | Path) -> Callable[[str | Path], Any]:
    run = RunDir.open(run_dir)
    content = run.read_json("config.json")
    system = content.get("system") if isinstance(content, dict) else None
    if system == "new-llm":
        from newllm_jax.newllm.run import restore_newllm

        return restore_newllm
    if system == "cascade":
        from newllm_jax.cascade.run import restore_cascade

        return restore_cascade
    if system == "finetune":
        from newllm_jax.finetuning.experiment import restore_finetune

        return restore_finetune
    raise InputError(f"{run.path / 'config.json'}: names no system that is known ({system!r})")


def generate(
    run: NewLLMRun | CascadeRun | FinetuneRun,
    prompt: str = "",
    *,
    max_words: int = 100,
    seed: int = 0,
    sampling: Sampling | None = None,
    exits: Exits | None = None,
) -> Iterator[str]:
    """Streams the text that follows a prompt, up to its end or `max_words` (for a SmolLM2: tokens).

    New-LLM goes on with the prompt, word by word; a SmolLM2, with or without stages, answers it as a user's turn.

    Args:
      run: what `restore` gives.
      exits: counts at which stage each token exited (CASCADE).

    Raises:
      InputError: a negative `max_words`, a seed out of range, or an empty prompt to a model that needs one.
    """
    from newllm_jax.newllm.run import NewLLMRun

    if isinstance(run, NewLLMRun):
        from newllm_jax.newllm import generate as newllm

        return newllm.generate(run, prompt, max_words=max_words, seed=seed, sampling=sampling)
    from newllm_jax.cascade.generate import generate_tokens, prompt_ids, stream_text
    from newllm_jax.cascade.run import CascadeRun

    base, chosen = run.base, sampling or Sampling()
    ids = prompt_ids(base.tokenizer, prompt)
    if isinstance(run, CascadeRun):
        criterion = run.config.criterion
        tokens = generate_tokens(base, run.stage, run.stages, criterion, ids, max_words, chosen, seed, exits)
    else:
        tokens = generate_tokens(base, None, (), "cosine", ids, max_words, chosen, seed, exits)
    return stream_text(base.tokenizer, tokens)


def evaluate(run_dir: str | Path) -> dict[str, Any]:
    """Measures the model of a run anew, on the data it was trained beside; writes nothing.

    Returns:
      CASCADE: `{"system", "ensemble"}`; the others: loss, perplexity and accuracy by split.
    """
    run = restore(run_dir)
    from newllm_jax.newllm.run import NewLLMRun

    if isinstance(run, NewLLMRun):
        from newllm_jax.newllm.experiment import evaluate_splits

        return {"system": "new-llm", **evaluate_splits(run)}
    from newllm_jax.cascade.run import CascadeRun

    if isinstance(run, CascadeRun):
        from newllm_jax.cascade.experiment import evaluate_run

        return {"system": "cascade", "ensemble": evaluate_run(run)}
    from newllm_jax.finetuning.experiment import evaluate_finetuned

    return {"system": "finetune", "validation": evaluate_finetuned(run)}
