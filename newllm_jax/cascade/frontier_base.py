"""The base itself on a frontier, and the chunks of other texts on which all of it is measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from newllm_jax.config import ChunkConfig
from newllm_jax.errors import InputError
from newllm_jax.smollm.alpaca import CHUNK, STRIDE, Encoder, load_alpaca
from newllm_jax.smollm.base import load_base
from newllm_jax.smollm.decoder import BaseDecoder
from newllm_jax.smollm.frontier_points import model_losses, point
from newllm_jax.smollm.generation_speed import generation_speed
from newllm_jax.sources.text import open_source

ELSEWHERE_CHUNKS = 300


def text_chunks(tokenizer: Encoder, dataset: str, count: int = ELSEWHERE_CHUNKS) -> np.ndarray:
    """The first chunks `[chunks, 129]` of the texts of a source with a column `text`, at most `count`.

    Its texts are read as one, in order, each followed by a line break. Raises InputError where they give no chunk.
    """
    ids: list[int] = []
    for row in open_source(dataset, "", "error").rows(("text",)):
        text = row["text"] or ""
        if text.strip():
            ids += tokenizer.encode(text.rstrip("\n") + "\n")
        if len(ids) > count * STRIDE + 1:
            break
    starts = range(0, min(len(ids) - STRIDE, count * STRIDE), STRIDE)
    if not starts:
        raise InputError(f"elsewhere: {dataset} gives no chunk of {CHUNK} tokens")
    return np.asarray([ids[start : start + CHUNK] for start in starts], np.int32)


def base_entries(
    config: ChunkConfig, elsewhere: str, speed: bool
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The point of the base alone on the test chunks of a configuration, and the chunks of other texts by name."""
    base = load_base(config)
    data = load_alpaca(base.tokenizer, config)
    others = {elsewhere: text_chunks(base.tokenizer, elsewhere)} if elsewhere else {}

    def at(chunks: np.ndarray) -> dict[str, Any]:
        return point(model_losses(base.model, base.params, chunks), 1.0)

    own = at(data.test)
    if speed:
        own["speed"] = generation_speed(BaseDecoder(base.model), base.params, data.test)
    entry = {
        "name": "base", "system": "base", "config": config.to_dict(), "policy": "none", "trained_parameters": 0,
        "points": [own], "elsewhere": {name: at(chunks) for name, chunks in others.items()},
        "source": base.source.provenance(), "data": data.summary(), "fingerprint": data.fingerprint,
    }  # fmt: skip
    return [entry], others
