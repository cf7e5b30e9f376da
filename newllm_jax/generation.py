"""Text from a trained model of any system: one prompt as a stream, or many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from newllm_jax.config import AskedPrecision, RunConfig, check, check_seed, checked
from newllm_jax.decoding.exits import Exits
from newllm_jax.systems import SYSTEMS, call

if TYPE_CHECKING:
    from newllm_jax.cascade.run import CascadeRun, DesignRun
    from newllm_jax.decoding.batches import Batches
    from newllm_jax.decoding.sampling import Sampling
    from newllm_jax.finetuning.run import FinetuneRun
    from newllm_jax.newllm.run import NewLLMRun

MOST_WORDS = 10**9  # of a generated text
MOST_TEXTS = 4096  # that are generated at a time
LONGEST_PROMPT = 10**6  # letters, which a tokenizer splits in a second or two


def generate(
    run: NewLLMRun | CascadeRun | DesignRun | FinetuneRun,
    prompt: str = "",
    *,
    max_words: int = 100,
    seed: int = 0,
    sampling: Sampling | None = None,
    exits: Exits | None = None,
    precision: AskedPrecision = "fp32",
) -> Iterator[str]:
    """Streams the text that follows a prompt, up to its end or `max_words` (for a SmolLM2: tokens).

    New-LLM continues the prompt, word by word; a SmolLM2, with or without stages, answers it as a user's turn.

    Args:
      run: what `restore` gives.
      exits: counts at which stage each token exited (CASCADE).
      precision: of the matrix products; in `bf16` or `fp16` weights and caches of a SmolLM2 are in half precision.

    Raises:
      InputError: an argument of another type or out of range, or an empty prompt to a model that needs one.

    >>> from newllm_jax import restore
    >>> words = list(generate(restore("runs/quickstart"), "w1 w2", max_words=3, seed=1))
    >>> len(words) <= 3
    True
    """
    check("exits", exits, "an Exits", exits is None or isinstance(exits, Exits))
    run = _in_precision(run, [prompt], precision)
    system, asked = SYSTEMS[run.config.system], _checked(max_words, seed, sampling)
    return call(
        system.generate, run, prompt, max_words=asked.max_words, seed=asked.seed, sampling=asked.sampling, exits=exits
    )  # fmt: skip


def generate_all(
    run: NewLLMRun | CascadeRun | DesignRun | FinetuneRun,
    prompts: Sequence[str],
    *,
    max_words: int = 100,
    seed: int = 0,
    sampling: Sampling | None = None,
    batch: int = 32,
    precision: AskedPrecision = "fp32",
) -> list[str]:
    """The whole text of each of many prompts: that of `generate` with the seed `seed` + the prompt's number, from 0.

    Prompts of equal length are computed together, so texts equal those of `generate` up to rounding.

    Args:
      batch: the most texts at a time.

    Raises:
      InputError: as `generate`, and where memory has no room for so many texts.

    >>> from newllm_jax import restore
    >>> generate_all(restore("runs/quickstart"), ["w1 w2", "w3"], max_words=0)
    ['', '']
    """
    check("prompts", prompts, "a list of texts", isinstance(prompts, Sequence) and not isinstance(prompts, str))
    run = _in_precision(run, prompts, precision)
    asked = _checked(max_words, seed, sampling, checked("batch", batch, int, least=1, most=MOST_TEXTS))
    return call(SYSTEMS[run.config.system].generate_all, run, prompts, asked)


def _in_precision(run: Any, prompts: Sequence[str], precision: AskedPrecision) -> Any:
    """The run with a model that computes in a precision, once run and prompts are found to be right."""
    from newllm_jax.training.precision import resolve_precision

    check("run", run, "what restore gives", isinstance(getattr(run, "config", None), RunConfig))
    for prompt in prompts:
        check("prompt", prompt, "a text", isinstance(prompt, str))
        check("prompt", prompt, f"of at most {LONGEST_PROMPT} letters", len(prompt) <= LONGEST_PROMPT)
    resolved = resolve_precision(checked("precision", precision, AskedPrecision))
    return call(SYSTEMS[run.config.system].in_precision, run, resolved)


def _checked(max_words: int, seed: int, sampling: Sampling | None, batch: int = 1) -> Batches:
    from newllm_jax.decoding.batches import Batches
    from newllm_jax.decoding.sampling import Sampling

    check("sampling", sampling, "a Sampling", sampling is None or isinstance(sampling, Sampling))
    words = checked("max_words", max_words, int, least=0, most=MOST_WORDS)
    return Batches(words, check_seed(seed), sampling or Sampling(), batch)
