"""A barrier between the thread blocks of a GPU kernel: Triton has none of its own.

The blocks share a counter in device memory, to which each adds 1 when it arrives, and which it then polls until all
have arrived. For that, all of them must be able to run at the same time.

Written for Pallas's Triton back end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu


def wait_for_blocks(
    counters: Any, index: Any, blocks: int, arrivals: Any, meanwhile: Callable[[], Any] = lambda: ()
) -> tuple[Any, Any, Any]:
    """Waits until some blocks have written what the next phase reads.

    All of them take part in the same number of barriers. The counter only grows, so the n-th barrier is passed when it
    has reached n * blocks, and it need not be reset.

    The writes of a block are published by its arrival: `debug_barrier` (`__syncthreads`) waits for all of its threads,
    and the atomic add that follows has release semantics in the whole device. The loads of the next phase must not be
    executed before the last poll; the returned zero sees to that (below). They could still find an old value in the
    cache of their multiprocessor, which the writes of others do not reach. So kernels use no value that another block
    writes until the barrier after the write, do not load from its sector of 32 bytes before, and write one value only
    to each address (arrays have an axis of steps or layers instead of being overwritten): no cache can hold another.

    Args:
      counters: int32, in device memory, zeros at the launch.
      index: of the counter of these blocks.
      blocks: how many they are.
      arrivals: counted by all barriers before this one; a carry of the kernel's loop. Computed from the loop's step
        instead, it tells the compiler too much: on an H200, loads came before the wait, and results were NaN.
      meanwhile: work for the time between this block's arrival and that of the last one: it writes results that no
        other block reads in the next phase, and prefetches inputs that no block writes. What it writes is published by
        this block's next arrival.

    Returns:
      `arrivals`, this barrier's included; a zero derived from the polled counter, which, added to an index, keeps the
      compiler from hoisting the loads of the next phase above the wait; and the result of `meanwhile`.
    """
    arrivals = arrivals + blocks
    plgpu.debug_barrier()
    before = plgpu.atomic_add(counters, (index,), jnp.int32(1))
    prefetched = meanwhile()
    counted = jax.lax.while_loop(
        lambda counted: counted < arrivals,
        lambda _: plgpu.load(counters.at[index], volatile=True),
        before + 1,  # the last block to arrive need not poll
    )
    return arrivals, jnp.minimum(counted - arrivals, 0), prefetched
