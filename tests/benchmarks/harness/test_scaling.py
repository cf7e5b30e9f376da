"""The model of an update's time: its formula by hand, and parameters that noisy measurements give back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.harness.scaling import TERMS, Network, Row, StepTime, fit, left_out_errors

pytestmark = pytest.mark.quick

MILLION = 1_000_000
PLAIN = StepTime(fixed=4e-3, example=0.5e-3, byte=1 / 50e9)
FLOORED = StepTime(floor=5e-3, fixed=1e-3, example=12e-6, byte=1 / 60e9)


def measured(model, batches, devices=(1, 2), size=500 * MILLION, noise=0.01, seed=0):
    """Rows as the model has them, with noise."""
    chance = np.random.default_rng(seed)
    return [
        Row(count, batch, model.seconds(count, batch, size) * (1 + noise * chance.standard_normal()), size)
        for count in devices
        for batch in batches
    ]


def largest_error(model, rows):
    return max(abs(model.error(row)) for row in rows)


def test_the_formula_by_hand():
    model = StepTime(floor=0.3, fixed=0.1, example=0.01, byte=0.001, latency=0.02)
    assert model.seconds(1, 10, 100) == 0.3  # 0.1 + 0.1 is under the floor, and one device sends nothing
    assert model.seconds(1, 50, 100) == pytest.approx(0.6)
    assert model.seconds(4, 200, 100) == pytest.approx(0.6 + 0.001 * 2 * 3 / 4 * 100 + 0.02 * 2)
    network = Network(host_devices=4, bandwidth=500, latency=0.5)
    within = 0.001 * 2 * 3 / 4 * 100 + 0.02 * 2
    assert network.seconds(model, 4, 200, 100) == model.seconds(4, 200, 100)
    assert network.seconds(model, 16, 800, 100) == pytest.approx(0.6 + within + 2 * 3 / 4 * 100 / 500 + 0.5 * 2)


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_gives_the_parameters_back(seed):
    rows = measured(PLAIN, (8, 16, 32, 64), seed=seed)
    model = fit(rows)
    assert model.terms == ("fixed", "example", "byte")
    for name in model.terms:
        assert getattr(model, name) == pytest.approx(getattr(PLAIN, name), rel=0.15), name
    assert largest_error(model, rows) < 0.03
    without = fit(rows, ("floor", *(term for term in TERMS if term != "byte" and term != "latency")))
    assert largest_error(without, rows) > 0.15


@pytest.mark.parametrize("seed", range(3))
def test_a_floor_is_found_where_there_is_one(seed):
    rows = measured(FLOORED, (32, 128, 256, 512, 1024, 2048, 4096), size=20 * MILLION, seed=seed)
    model = fit(rows)
    assert model.terms == ("floor", "fixed", "example", "byte")
    assert (model.floor, model.example) == pytest.approx((FLOORED.floor, FLOORED.example), rel=0.05)
    assert largest_error(model, rows) < 0.05 < largest_error(fit(rows, tuple(TERMS)), rows)


def test_only_terms_are_fitted_that_are_told_apart():
    both = StepTime(fixed=4e-3, example=0.5e-3, byte=1 / 50e9, latency=1e-3)
    two = fit(measured(both, (8, 16, 32), noise=0))
    assert two.terms == ("fixed", "example", "byte")
    more = fit(measured(both, (8, 16, 32), devices=(1, 2, 4, 8), noise=0))
    assert more.terms == ("fixed", "example", "byte", "latency")
    assert (1 / more.byte, more.latency) == pytest.approx((50e9, 1e-3))
    assert fit(measured(both, (8, 16, 32), size=0, noise=0)).terms == ("fixed", "example", "latency")
    assert fit(measured(both, (8, 16, 32), devices=(1,), noise=0)).terms == ("fixed", "example")
    assert fit(measured(both, (8,), devices=(1,), noise=0)).terms == ("fixed",)

    size, (bandwidth, latency) = 500 * MILLION, two.readings(500 * MILLION)
    assert bandwidth.seconds(2, 32, size) == pytest.approx(latency.seconds(2, 32, size))
    assert bandwidth.all_reduce(8, size) / latency.all_reduce(8, size) == pytest.approx(1.75 / 3)
    assert more.readings(size) == (more,)


def test_no_parameter_is_below_zero():
    faster = [Row(1, batch, 0.1 * batch**1.2, MILLION) for batch in (1, 2, 4, 8)]
    faster += [Row(2, batch, 0.9 * 0.1 * (batch / 2) ** 1.2, MILLION) for batch in (2, 4, 8)]  # as if caches helped
    model = fit(faster)
    assert min(model.floor, model.fixed, model.example, model.byte, model.latency) == 0
    assert "byte" in model.terms and model.byte == 0


def test_errors_of_rows_left_out():
    rows = measured(PLAIN, (8, 16, 32, 64), noise=0)
    assert left_out_errors(rows) == pytest.approx([0] * 8, abs=1e-9)
    wrong = [*rows[:-1], Row(2, 64, 1.2 * rows[-1].seconds, rows[-1].bytes)]
    errors = left_out_errors(wrong)
    assert errors[-1] == pytest.approx(1 / 1.2 - 1)  # the others know nothing of it
    assert abs(fit(wrong).error(wrong[-1])) < 0.9 * abs(errors[-1])
    alone = left_out_errors(rows[:5])  # only the last is of two devices
    assert alone[-1] is None and None not in alone[:-1]


def test_times_are_monotone():
    devices, size = [2**power for power in range(10)], 500 * MILLION
    for model in (PLAIN, FLOORED, StepTime(fixed=1e-3, example=1e-4, latency=1e-5)):
        for network in (Network(), Network(bandwidth=1e9), Network(host_devices=2, latency=1e-3)):
            computing = [model.compute(4096 / count) for count in devices]
            assert computing == sorted(computing, reverse=True)
            same_a_device = [network.seconds(model, count, 64 * count, size) for count in devices]
            assert same_a_device == sorted(same_a_device) and same_a_device[-1] > same_a_device[0]
        rates = [64 * count / model.seconds(count, 64 * count, size) for count in devices[1:]]
        assert rates == sorted(rates)  # from 2 on, within a host: the first all-reduce can cost more than it gives
    slow, fast = (Network(bandwidth=rate) for rate in (1e9, 100e9))
    assert slow.seconds(PLAIN, 8, 64, size) == fast.seconds(PLAIN, 8, 64, size)
    assert slow.seconds(PLAIN, 16, 64, size) > fast.seconds(PLAIN, 16, 64, size)
    assert math.isclose(Network(host_devices=512).seconds(PLAIN, 512, 512, size), PLAIN.seconds(512, 512, size))
