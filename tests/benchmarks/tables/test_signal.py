"""The table of signals: ratios of the outer layers in the direction in which each goes."""

from __future__ import annotations

import pytest

from benchmarks.tables.benchmark import tables_of

pytestmark = pytest.mark.quick


def entry(epoch, signal, gradient, val_ppl):
    return {"epoch": epoch, "signal": signal, "gradient": gradient, "val_ppl": val_ppl}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_ratios_and_dashes():
    epochs = [
        entry(0, [8.0, 4.0, 2.0], [1.0, 5.0, 10.0], 1000.0),
        entry(10, [0.0, 1.0, 1.0], [3.0, 1.0, 0.5], None),
        entry(20, [1.0, 2.0, 3.0], [1.0, 1.0, 4.0], 54.321),
    ]
    results = {"benchmark": "signal", "variants": {"normal": {"epochs": epochs}, "he": {"error": "out of memory"}}}
    assert cells(tables_of(results)["signal"])[0] == ["variant", "what", *(f"epoch {n}" for n in (0, 10, 16, 20))]
    assert cells(tables_of(results)["signal"])[2:] == [
        ["normal", "signal, layer 3 / layer 1", "0.25", "-", "-", "3"],
        ["normal", "gradient, layer 1 / layer 3", "0.1", "6", "-", "0.25"],
        ["normal", "val PPL", "1000.00", "-", "-", "54.32"],
        ["he", "out of memory", "-", "-", "-", "-"],
    ]
