"""The example of a report: the first tokens of the validation text, each with the place where it exited."""

from __future__ import annotations

from typing import Any

import numpy as np

from newllm_jax.smollm.alpaca import STRIDE
from newllm_jax.smollm.tokenizer import Tokenizer


def exit_example(tokenizer: Tokenizer, chunks: np.ndarray, exits: np.ndarray, count: int) -> dict[str, Any]:
    """`{"example": {"tokens", "exits"}}`, as `results.json` has it; {} for no tokens.

    Args:
      chunks: ids of the validation chunks, `[chunks, 129]`.
      exits: where each of their tokens exited, `[chunks * 128]` or `[chunks, 128]`; 0: at the base.
      count: the most tokens. A token is one that is read; what exits is the prediction of the next.
    """
    ids = chunks[:, :STRIDE].ravel()[:count]
    if not len(ids):
        return {}
    return {"example": {"tokens": token_texts(tokenizer, ids.tolist()), "exits": exits.ravel()[: len(ids)].tolist()}}


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each id; of several that are one character together, the last one has it, the others have none."""
    texts, waiting = list[str](), list[int]()
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        whole = not text.endswith("\ufffd")
        texts.append(text if whole else "")
        if whole:
            waiting.clear()
    return texts
