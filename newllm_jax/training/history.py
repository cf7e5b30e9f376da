"""What follows from the epochs so far: the best of them, early stopping, whether a training is finished.

All of it is a pure function of the history, so that a resumed run needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from newllm_jax.config import RunConfig

Entry: TypeAlias = dict[str, Any]  # one epoch, as metrics.jsonl and results.json have it
History: TypeAlias = Sequence[Entry]  # the entries of epochs 1, 2, ...


def best_epoch(history: History) -> int:
    """The epoch (from 1) of the lowest validation loss, the first of several; 0 where there is none."""
    return 1 + min(range(len(history)), key=lambda index: history[index]["val_loss"]) if history else 0


def at_epoch(history: History, epoch: int) -> Entry:
    """Epoch, validation loss and perplexity of one epoch, as `results.json` has them."""
    return {key: history[epoch - 1][key] for key in ("epoch", "val_loss", "val_ppl")}


def stopped_early(history: History, config: RunConfig) -> bool:
    """Whether the patience was exhausted at or before the end of this history."""
    return patience_exhausted([entry["val_loss"] for entry in history], config.patience, config.minimum_gain)


def is_finished(history: History, config: RunConfig) -> bool:
    """Whether a training is at its end: by its last epoch, or early."""
    return len(history) >= config.num_epochs or stopped_early(history, config)


def how_it_stopped(history: History, config: RunConfig) -> str:
    """Why a training ended, and the setting that would let it go on."""
    if stopped_early(history, config):
        return f"early, after epoch {len(history)}: no gain in {config.patience} epochs (raise patience to continue)"
    ended = f"after epoch {len(history)}, the last of num_epochs"
    return f"{ended}, where the schedule ends" if has_decayed(config.to_dict()) else f"{ended} (raise it to continue)"


def has_decayed(config: Mapping[str, Any]) -> bool:
    """Whether the learning rate of these settings is 0 after their last epoch, so that more epochs would do nothing."""
    return config.get("schedule") == "cosine" and config.get("decay_epochs") is None


def patience_exhausted(val_losses: Sequence[float], patience: int, minimum_gain: float) -> bool:
    """Whether `patience` epochs in a row failed to lower the loss by more than `minimum_gain` (nats)."""
    reference, without_gain = math.inf, 0
    for loss in val_losses:
        gained = loss < reference - minimum_gain
        reference, without_gain = (loss, 0) if gained else (reference, without_gain + 1)
        if without_gain >= patience:
            return True
    return False
