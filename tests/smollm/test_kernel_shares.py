"""How much of a model a thread block has in registers at a time."""

from __future__ import annotations

import pytest

from newllm_jax.smollm.kernel_shares import phase_bytes
from newllm_jax.smollm.llama_config import LlamaConfig

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "number_bytes, blocks, kib",
    [
        (4, 132, 32 + 80 + 64),  # phase 3: output and gates, and the splits of 16 heads
        (2, 132, 16 + 40 + 64),
        (2, 48, 48 + 40 + 96),  # phase 5: down, the next queries, keys and values, and the activations
    ],
)
def test_the_phase_with_most_of_smollm2_135m(number_bytes, blocks, kib):
    assert phase_bytes(LlamaConfig(), number_bytes, blocks) == kib * 1024


def test_a_wide_network_has_most_in_its_own_phase():
    config = LlamaConfig(hidden_size=768, intermediate_size=2112)
    assert phase_bytes(config, 4, 132) == (96 + 68 + 48) * 1024  # gates, down, and the vector for 16 rows
