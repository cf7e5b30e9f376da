"""How fast a decoder makes text on this device, compilation left out."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from newllm_jax.decoding.loop import Decoder, generated_tokens
from newllm_jax.decoding.sampling import Sampling

TOKENS, REPEATS, PROMPT = 128, 3, 64
BATCHES = (1, 32)  # texts at once


def generation_speed(decoder: Decoder, params: Any, chunks: np.ndarray) -> dict[str, dict[str, Any]]:
    """Tokens a second of greedy texts that follow the first ids of chunks `[chunks, 129]`, by the number of texts.

    The median of some repetitions, and the share of the tokens that took each exit.
    """
    return {str(batch): _speed(decoder, params, chunks, batch) for batch in BATCHES}


def _speed(decoder: Decoder, params: Any, chunks: np.ndarray, batch: int) -> dict[str, Any]:
    prompts = np.resize(chunks[:, :PROMPT], (batch, PROMPT)).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), batch)
    seconds, exits = list[float](), np.zeros(0)
    for _ in range(REPEATS + 1):  # the first compiles
        pieces = generated_tokens(decoder, params, prompts, TOKENS, 2 * TOKENS, Sampling(temperature=0), keys)
        first = next(pieces)[1].shape[1]  # the prompt is read by then
        started = time.perf_counter()
        exits = np.concatenate([each for _, each in pieces], axis=1)
        seconds.append((time.perf_counter() - started) / (TOKENS - first))
    shares = [float(np.mean(exits == number)) for number in range(decoder.exits)]
    return {"tokens_per_second": batch / float(np.median(seconds[1:])), "exit_rates": shares}
