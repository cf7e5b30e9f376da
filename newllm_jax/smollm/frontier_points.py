"""A point of quality against compute: the loss of a model over chunks, an interval around it, and what a token costs.

The interval is by the bootstrap over chunks (Efron 1979): tokens of one chunk are not independent.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import numpy as np

from newllm_jax.bars import progress_bar
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.losses import perplexity, token_losses
from newllm_jax.training.step import Params

RESAMPLINGS, INTERVAL = 1000, (2.5, 97.5)  # percentiles
CHUNKS_AT_ONCE = 8


def point(losses: np.ndarray, flops: float, **facts: Any) -> dict[str, Any]:
    """A point from the losses `[chunks, 128]` (nats) of tokens that cost `flops` passes of the base on average."""
    by_chunk = losses.mean(axis=1, dtype=np.float64)
    low, high = bootstrap(by_chunk)
    loss = float(by_chunk.mean())
    return {**facts, "flops": flops, "loss": loss, "ppl": perplexity(loss), "low": low, "high": high}


def bootstrap(by_chunk: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The interval in which the mean over as many other chunks would lie 95 times in 100."""
    drawn = np.random.default_rng(seed).integers(0, len(by_chunk), (RESAMPLINGS, len(by_chunk)))
    low, high = np.percentile(by_chunk[drawn].mean(axis=1), INTERVAL)
    return float(low), float(high)


def model_losses(model: SmolLM2, params: Params, chunks: np.ndarray) -> np.ndarray:
    """The losses (nats) `[chunks, 128]` of a model on chunks `[chunks, 129]`."""
    found, params = list[np.ndarray](), jax.device_put(params)
    with progress_bar("losses", len(chunks)) as advance:
        for start in range(0, len(chunks), CHUNKS_AT_ONCE):
            ids = chunks[start : start + CHUNKS_AT_ONCE]
            padded = np.pad(ids, [(0, CHUNKS_AT_ONCE - len(ids)), (0, 0)])
            found.append(np.asarray(_losses(model, params, padded))[: len(ids)])
            advance(len(ids))
    return np.concatenate(found)


@partial(jax.jit, static_argnums=0)
def _losses(model: SmolLM2, params: Params, ids: jax.Array) -> jax.Array:
    logits, _ = cast(tuple[jax.Array, Any], model.apply({"params": params}, ids[:, :-1]))
    return token_losses(logits, ids[:, 1:])[0]
