"""How the kernels of the time loop divide their work, by sizes and card."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from newllm_jax.newllm.recurrence import gpu_tiling
from newllm_jax.newllm.recurrence.gpu_tiling import MOST_BLOCKS, SMALLEST_DEPTH, Tiling, shared_bytes, tiling_for
from newllm_jax.training.back_end import shared_memory

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("batch, members, rows", [(128, 1, 16), (128, 2, 32), (128, 8, 128), (48, 8, 16), (16, 8, 16)])
def test_groups_of_members_are_whole(batch, members, rows):
    assert tiling_for(batch, jnp.bfloat16, (512, 512), members).rows == rows


@pytest.mark.parametrize("batch, rows", [(1, 16), (32, 16), (256, 32), (300, 64), (4096, 64)])
def test_groups_fill_the_card_but_have_rows_enough(batch, rows):
    assert tiling_for(batch, jnp.bfloat16, (512, 512)).rows == rows


@pytest.fixture
def card(monkeypatch):
    """Pretends that the GPU has some multiprocessors."""
    return lambda count: monkeypatch.setattr(gpu_tiling, "multiprocessors", lambda: count)


@pytest.mark.parametrize("batch, members, rows, blocks", [(64, 1, 16, 32), (64, 3, 64, 32), (128, 1, 16, 16)])
def test_wide_layers_of_a_small_batch_are_shared_out_among_more_blocks(card, batch, members, rows, blocks):
    card(132)
    tiling = tiling_for(batch, jnp.bfloat16, (1024, 1024), members)
    assert (tiling.rows, tiling.blocks) == (rows, blocks)
    assert members * batch // rows * blocks <= 128  # one wave
    card(108)
    assert tiling_for(batch, jnp.bfloat16, (1024, 1024), members).blocks == 16


def test_other_layers_are_not(card):
    card(132)
    assert tiling_for(64, jnp.float32, (1024, 1024)).blocks == 32
    for widths in ((512, 1024), (1024, 512)):
        assert tiling_for(64, jnp.float32, widths).blocks == tiling_for(64, jnp.bfloat16, widths).blocks == 16


@pytest.mark.parametrize("storage", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "batch, members, share, count, blocks",
    [(32, 1, 8, 132, 32), (32, 2, 8, 132, 32), (64, 1, 8, 132, 32), (65, 1, 8, 132, 16), (32, 3, 8, 132, 16),
     (32, 1, 8, 108, 16), (32, 1, 16, 132, 16)],
)  # fmt: skip
def test_few_rows_are_shared_out_among_more_blocks(card, monkeypatch, storage, batch, members, share, count, blocks):
    card(count)
    monkeypatch.setattr(gpu_tiling, "smallest_share", lambda: share)
    tiling = tiling_for(batch, storage, (512, 256), members)
    assert (tiling.rows, tiling.blocks, tiling.warps) == (16, blocks, 2 if blocks == 32 else 4)


def test_groups_of_several_members_run_at_the_same_time(card):
    card(132)
    for batch in (16, 48, 64, 128):
        for width in (256, 1024):
            for members in range(1, 9):
                tiling = tiling_for(batch, jnp.bfloat16, (width, width), members)
                largest = tiling.rows in (64, 128) or 2 * tiling.rows > batch or batch % (2 * tiling.rows)
                assert largest or members * batch // tiling.rows * tiling.blocks <= 128
                assert tiling.blocks <= MOST_BLOCKS


BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    "tiling, storage, widths, measured",
    [
        ((16, 16, 128, 4, 3), BF16, (512, 256), 38_912), ((16, 16, 128, 4, 3), BF16, (512, 512), 57_344),
        ((16, 16, 128, 4, 3), BF16, (512, 1024), 106_496), ((16, 16, 64, 4, 3), F32, (512, 256), 32_768),
        ((32, 16, 64, 4, 3), F32, (512, 256), 41_984), ((16, 32, 128, 2, 4), BF16, (512, 256), 44_032),
        ((16, 32, 64, 4, 5), BF16, (1024, 1024), 57_344), ((64, 16, 64, 4, 3), F32, (512, 512), 122_880),
        ((64, 16, 64, 4, 5), BF16, (512, 512), 102_400), ((64, 16, 64, 4, 5), BF16, (512, 1024), 163_840),
    ],
)  # fmt: skip
def test_shared_memory_is_what_triton_takes_or_a_little_more(tiling, storage, widths, measured):
    """Measured: what Triton's compiler says of the forward kernel, of 64 rows for Hopper."""
    assert measured <= shared_bytes(Tiling(*tiling), storage, widths) <= 1.11 * measured


@pytest.mark.parametrize("storage", [BF16, F32])
@pytest.mark.parametrize("capability, kib", [("8.9", 99), ("8.0", 163), ("9.0", 227), ("12.0", 99)])
def test_tiles_fit_into_the_memory_of_a_multiprocessor(monkeypatch, capability, kib, storage):
    device = SimpleNamespace(compute_capability=capability, core_count=132)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert shared_memory() == 1024 * kib
    depths = set()
    for batch in (16, 32, 64, 128, 512):
        for widths in ((512, 256), (512, 1024), (1024, 1024), (2048, 2048), (512, 4096)):
            for members in (1, 3):
                tiling = tiling_for(batch, storage, widths, members)
                assert shared_bytes(tiling, storage, widths) <= shared_memory()
                assert members == 1 or batch % tiling.rows == 0
                depths.add(tiling.depth)
    assert min(depths) >= SMALLEST_DEPTH and max(depths) == (128 if storage == BF16 else 64)
