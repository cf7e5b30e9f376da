"""Early stopping as a pure function of the validation losses so far: a resumed run needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_epoch(val_losses: Sequence[float]) -> int:
    """The epoch (from 1) of the lowest loss, the first of several; 0 where there is none."""
    return 1 + min(range(len(val_losses)), key=val_losses.__getitem__) if val_losses else 0


def patience_exhausted(val_losses: Sequence[float], patience: int, minimum_gain: float) -> bool:
    """Whether `patience` epochs in a row failed to lower the loss by more than `minimum_gain` (nats)."""
    reference, without_gain = math.inf, 0
    for loss in val_losses:
        gained = loss < reference - minimum_gain
        reference, without_gain = (loss, 0) if gained else (reference, without_gain + 1)
        if without_gain >= patience:
            return True
    return False
