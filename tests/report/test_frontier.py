"""The table and the plot of a frontier where a model has failed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from newllm_jax.report.frontier import curve_table, frontier_page, frontier_table, save_frontier


def entry(name: str, policy: str, *perplexities: float, **more: Any) -> dict[str, Any]:
    points = [
        {"flops": 1 + place / 10, "ppl": ppl, "loss": math.log(ppl) if ppl < math.inf else 800.0, "low": 0.5, "high": 9}
        for place, ppl in enumerate(perplexities)
    ]  # fmt: skip
    return {"name": name, "policy": policy, "trained_parameters": 1234, "points": points,
            "config": {"criterion": "margin"}, **more}  # fmt: skip


@pytest.mark.parametrize("failed", [1e9, 1e200, 1e304, math.inf])
def test_a_model_that_failed_has_its_place(failed, tmp_path):
    base = entry("base", "none", 20.0, data={"test_chunks": 7, "source": "rows"}, source={"source": "llama"})
    entries = [base, *(entry("run", policy, 19.0, failed) for policy in ("criterion", "oracle", "random"))]
    content = {"command": "newllm frontier run", "entries": entries}
    save_frontier(tmp_path / "frontier.png", content)
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    table = frontier_table(content)
    assert "| run   |              1,234 |           1.000 |    19.00 | 2.9444 (0.500 to 9.000) |" in table
    assert table.count("run") == 1  # neither the oracle nor chance
    curves = curve_table(content)
    assert [line.split("|")[2].strip() for line in curves.splitlines()[2:]] == [
        "margin", "oracle (knows the loss of both paths)", "chance"
    ]  # fmt: skip
    assert "1.00: 19.00, 1.10: " in curves and max(map(len, curves.splitlines())) < 120
    page = frontier_page(content)
    assert table in page and curves in page and "7 chunks of rows; base: llama" in page
