"""Every row of a comparison makes the same updates, however many of them its preparation took."""

from __future__ import annotations

import pytest

from benchmarks.harness.timing import loss_curve, time_in_turns, time_updates, updates_needed

pytestmark = pytest.mark.quick


class Counting:
    """A training whose loss is the number of the last update, and whose preparation makes some updates."""

    def __init__(self, prepares):
        self.prepares, self.made = prepares, 0

    def prepare(self):
        self.run(self.prepares)
        return self.prepares

    def run(self, updates):
        self.made += updates

    def loss(self):
        return float(self.made)


@pytest.mark.parametrize("prepares", [0, 1, 3])
def test_blocks_end_at_the_same_updates(prepares):
    assert time_updates(Counting(prepares), updates=5, repeats=2)["losses"] == [5, 10, 15]
    assert time_updates(Counting(prepares), updates=1, repeats=2)["losses"] == [4, 5, 6]
    assert loss_curve(Counting(prepares), 2) == [4, 5, 6]


@pytest.mark.parametrize(("updates", "repeats", "curve"), [(1, 1, 2), (5, 2, 2), (1, 1, 0)])
def test_there_is_a_batch_for_every_update(updates, repeats, curve):
    timed, plain = Counting(3), Counting(3)
    time_updates(timed, updates, repeats)
    loss_curve(plain, curve)
    assert updates_needed(updates, repeats, curve) == max(timed.made, plain.made)


def test_several_trainings_take_turns_and_make_the_updates_that_one_alone_makes():
    order = []

    class Watched(Counting):
        def run(self, updates):
            order.append(self.prepares)
            super().run(updates)

    rows = time_in_turns([Watched(0), Watched(3)], updates=5, repeats=2)
    assert order[-4:] == [0, 3, 0, 3]
    assert [row["losses"] for row in rows] == [[5, 10, 15], [5, 10, 15]]
