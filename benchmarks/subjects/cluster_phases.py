"""A phase of New-LLM's time loop in thread-block clusters (Pallas's Mosaic GPU back end): how long it takes at least.

A cluster of 8 blocks takes some rows of the batch through all layers of all steps. In a phase each block computes 64 of
512 columns, `h = ReLU(W h)`, and the cluster exchanges them; gates, LayerNorm and dropout are left out. In shapes, R is
the rows of a cluster, H the width; matrices are transposed, `[H, R]`, so that 64 columns fill the tensor cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.harness.timing import spread

WIDTH, BLOCKS = 512, 8
COLUMNS = WIDTH // BLOCKS  # of a block


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """A row for each case of the task (`clusters`, `rows`, `layers`, `exchange`): microseconds a phase."""
    return {
        "rows": [case | measure_case(**case, steps=task["steps"], repeats=task["repeats"]) for case in task["cases"]]
    }


def measure_case(clusters: int, rows: int, layers: int, exchange: str, steps: int, repeats: int) -> dict[str, Any]:
    """Times the phases, and compares the last of a single step with plain JAX where columns are exchanged."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((clusters * rows, WIDTH)), jnp.bfloat16)
    weights = jnp.asarray(draw.standard_normal((layers, WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5, jnp.bfloat16)
    run = jax.jit(phases(clusters, rows, layers, steps, exchange))
    jax.block_until_ready(run(x, weights))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run(x, weights))
        seconds.append((time.perf_counter() - started) / (layers * steps))
    row: dict[str, Any] = {"phase_seconds": spread(seconds)}
    if not exchange.startswith("none"):
        expected = x.astype(jnp.float32)
        for weight in weights.astype(jnp.float32):
            expected = jnp.maximum(expected @ weight.T, 0).astype(jnp.bfloat16).astype(jnp.float32)
        found = jax.jit(phases(clusters, rows, layers, 1, exchange))(x, weights)[-1].astype(jnp.float32)
        row["error"] = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    return row


def phases(clusters: int, rows: int, layers: int, steps: int, exchange: str) -> Callable[[Any, Any], jax.Array]:
    """(x `[clusters R, H]`, weights `[L, H, H]`) -> the states of all phases, `[steps L, clusters R, H]`, bf16."""
    count, kind = steps * layers, jnp.bfloat16
    by_memory, stay = exchange == "device memory", exchange == "none, weights stay"
    multicast = exchange == "device memory, multicast"  # states are [steps L, clusters, H, R] there
    minor = 64 if by_memory else rows
    transforms = plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(2 * minor)

    def kernel(x, weights, states, held, kernels, tile, arrived, loaded, weights_loaded, all_came):
        cluster, rank = lax.axis_index("cluster"), lax.axis_index("rank")
        mine = pl.ds(pl.multiple_of(rank * COLUMNS, COLUMNS), COLUMNS)

        def load_weights(phase, slot):
            first = lax.rem(phase, layers) * WIDTH + rank * COLUMNS
            plgpu.copy_gmem_to_smem(weights.at[pl.ds(first, COLUMNS), :], kernels.at[slot], weights_loaded.at[slot])

        size = rows if by_memory else WIDTH
        plgpu.copy_gmem_to_smem(x.at[pl.ds(cluster * size, size), :], held.at[0], loaded.at[0])
        for slot in range(2):
            load_weights(slot, slot)
        plgpu.barrier_wait(loaded.at[0])
        if stay:
            for slot in range(2):
                plgpu.barrier_wait(weights_loaded.at[slot])
        plgpu.barrier_arrive(all_came.at[2])  # nobody stores in the memory of a block that has not begun
        plgpu.barrier_wait(all_came.at[2])

        def phase(number, _):
            slot = lax.rem(number, 2)
            other = 1 - slot
            if not stay:
                plgpu.barrier_wait(weights_loaded.at[slot])

            def multiply(sums):
                operand = held.at[slot].transpose((1, 0)) if by_memory else held.at[slot]
                plgpu.wgmma(sums, kernels.at[slot], operand)
                return sums[...]

            h = jnp.maximum(
                pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((COLUMNS, rows), jnp.float32)), 0.0
            ).astype(kind)
            if exchange == "shared memory":
                for peer in range(BLOCKS):
                    theirs = held.at[other].at[mine, :]
                    number_of_peer = {"cluster_idx": jnp.int32(peer), "cluster_dim": "rank"}
                    plgpu.async_store_smem(h, theirs, arrived.at[other], **number_of_peer)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy before has read the tile
            place = number * clusters + cluster
            here = pl.ds(place * rows, rows)
            if multicast:
                tile[...] = h
                plgpu.commit_smem()
                first = pl.multiple_of(place * WIDTH + rank * COLUMNS, COLUMNS)
                plgpu.copy_smem_to_gmem(tile, states.at[pl.ds(first, COLUMNS), :])
            else:
                tile.transpose((1, 0))[...] = h
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, states.at[here, mine])
            if by_memory or multicast:
                plgpu.wait_smem_to_gmem(0)
            if multicast:  # a copy for all is divided by rows among the blocks: each loads what it has just written
                all_rows = states.at[pl.ds(pl.multiple_of(place * WIDTH, WIDTH), WIDTH), :]
                plgpu.copy_gmem_to_smem(all_rows, held.at[other], loaded.at[other], collective_axes="rank")
            if by_memory:
                plgpu.barrier_arrive(all_came.at[other])
            if not stay:

                @pl.when(number + 2 < count)
                def _():
                    load_weights(number + 2, slot)

            if by_memory:
                plgpu.barrier_wait(all_came.at[other])
                plgpu.copy_gmem_to_smem(states.at[here, :], held.at[other], loaded.at[other])
            if by_memory or multicast:
                plgpu.barrier_wait(loaded.at[other])
            elif exchange == "shared memory":
                plgpu.barrier_wait(arrived.at[other])
                plgpu.commit_smem()
            return ()

        lax.fori_loop(0, count, phase, ())
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(all_came.at[2])  # nor of one that has ended
        plgpu.barrier_wait(all_came.at[2])

    launch = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(
            (count * clusters * WIDTH, rows) if multicast else (count * clusters * rows, WIDTH), kind
        ),
        grid=(clusters,), grid_names=("cluster",), cluster=(BLOCKS,), cluster_names=("rank",),
        scratch_types=[
            plgpu.SMEM((2, rows, WIDTH) if by_memory else (2, WIDTH, rows), kind, transforms=transforms),
            plgpu.SMEM((2, COLUMNS, WIDTH), kind, transforms=transforms),
            plgpu.SMEM((COLUMNS, rows) if multicast else (rows, COLUMNS), kind, transforms=transforms),
            plgpu.Barrier(num_arrivals=BLOCKS, num_barriers=2),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
            plgpu.ClusterBarrier(collective_axes=("rank",), num_barriers=3),
        ],
    )  # fmt: skip

    def run(x: Any, weights: Any) -> jax.Array:
        if not by_memory:
            x = x.reshape(clusters, rows, WIDTH).swapaxes(1, 2).reshape(clusters * WIDTH, rows)
        states = launch(x, weights.reshape(layers * WIDTH, WIDTH))
        if multicast:
            states = states.reshape(count, clusters, WIDTH, rows).swapaxes(2, 3)
        return states.reshape(count, clusters * rows, WIDTH)

    return run
