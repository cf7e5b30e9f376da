"""Early stopping, from the losses alone."""

from __future__ import annotations

import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.training.history import best_epoch, how_it_stopped, patience_exhausted


@pytest.mark.parametrize(
    ("losses", "patience", "minimum_gain", "stopped"),
    [
        ([], 1, 0.0, False),
        ([3.0, 2.0, 1.0], 1, 0.0, False),
        ([3.0, 2.0, 2.0], 1, 0.0, True),  # no lower is no gain
        ([3.0, 2.0, 2.5, 1.9], 2, 0.0, False),
        ([3.0, 2.0, 2.5, 2.4], 2, 0.0, True),
        ([3.0, 2.9995, 2.999], 2, 0.001, True),  # lower, but by no more than the minimum gain
        ([3.0, 2.9995, 2.9985], 2, 0.001, False),  # small gains add up
        ([3.0, 3.0, 2.0], 1, 0.0, True),  # what comes after a stop does not undo it
        ([5.3436, 5.0232, 5.0461], 1, 0.0, True),  # stage 1 of the CASCADE report stopped at epoch 3
        ([2.94733, 2.94731, 2.9722], 1, 0.0, True),  # stage 4: epoch 2 was lower, by less than the log shows
    ],
)
def test_patience(losses, patience, minimum_gain, stopped):
    assert patience_exhausted(losses, patience, minimum_gain) is stopped


def test_best_epoch_is_the_first_lowest_however_small_the_gain():
    def history(*losses):
        return [{"val_loss": loss} for loss in losses]

    assert best_epoch([]) == 0
    assert best_epoch(history(3.0, 2.0, 1.9999, 1.9999, 2.5)) == 3


def test_the_end_says_what_lets_a_training_go_on():
    def ended(**settings):
        return how_it_stopped([{"val_loss": 2.0}, {"val_loss": 1.0}], NewLLMConfig(num_epochs=2, **settings))

    assert ended() == "after epoch 2, the last of num_epochs (raise it to continue)"
    assert ended(schedule="cosine") == "after epoch 2, the last of num_epochs, where the schedule ends"
    assert ended(schedule="cosine", decay_epochs=4) == ended()  # the learning rate is not 0 yet
