"""The epochs that a report has texts of."""

from __future__ import annotations

import pytest

from newllm_jax.errors import InputError, Note
from newllm_jax.training.samples import epoch_samples, sampled_epochs

pytestmark = pytest.mark.quick


class Stored:
    """Checkpoints whose parameters are their epochs; one is damaged."""

    epochs = (1, 5, 9, 10)

    def params(self, epoch, like):
        if epoch == 5:
            raise InputError("damaged")
        return epoch


@pytest.mark.parametrize(
    ("kept", "sampled"),
    [((), []), ([1], [1]), ([1, 2], [1, 2]), ([1, 2, 3], [1, 2, 3]), ([1, 5, 10, 15, 19, 20], [1, 10, 20]),
     ([4, 5, 9, 10], [4, 5, 10])],
)  # fmt: skip
def test_the_first_the_middle_and_the_last(kept, sampled):
    assert sampled_epochs(kept) == sampled


def test_an_epoch_that_cannot_be_read_is_left_out():
    with pytest.warns(Note, match="no text of epoch 5 for the report: damaged"):
        found = epoch_samples(Stored(), None, "why", lambda params: iter(["epoch", str(params)]), " ")  # type: ignore[arg-type]
    assert found == [{"epoch": epoch, "prompt": "why", "text": f"epoch {epoch}"} for epoch in (1, 10)]
