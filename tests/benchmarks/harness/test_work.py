"""Counted work, on sizes that a pencil can check."""

from __future__ import annotations

import pytest

from benchmarks.harness.work import newllm_plain_update, newllm_update
from newllm_jax.config import NewLLMConfig

pytestmark = pytest.mark.quick


def test_the_plain_loop_moves_what_the_kernels_keep():
    """2 texts of 3 steps, 2 layers of 4, a context of 4: 20 numbers a position, 96 weights in the loop."""
    config = NewLLMConfig(
        batch_size=2, sequence_length=4, stride=4, num_layers=2, hidden_dim=4, context_dim=4, embed_dim=4
    )
    counted = newllm_update(config, 10)
    for operand, passes in ((2, 52), (4, 68)):
        found = newllm_plain_update(config, 10, operand)
        numbers, weights = 2 * 3 * (4 * 2 + 3 * 4), 4 * (4 + 4 + 12)
        assert found.flops == counted.flops
        assert found.bytes - counted.bytes == numbers * passes + 2 * 3 * weights * operand
