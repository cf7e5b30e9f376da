"""The kernel of the time loop backward in clusters of thread blocks: see `cluster_group.py`. `cluster.py` calls it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from newllm_jax.newllm.recurrence.cell import CONTEXT_BOUND
from newllm_jax.newllm.recurrence.cluster_group import (
    Between,
    Cluster,
    Shared,
    by_rows,
    load,
    load_by_rows,
    sigmoid,
    sum_over_blocks,
    to,
)
from newllm_jax.newllm.recurrence.cluster_tiling import COLUMNS, ROWS


class Inputs(NamedTuple):
    """What the kernel reads, of all members.

    Attributes:
      d_last: d_c_T, `[M, B, C]`.
      d_outputs: `[M, T, B, H]`, of `outputs` by the loss, not through the later steps.
      scale: `[M, 1]`, `CellDropout.scale`.
      contexts, states, outputs, gates, moments: what `forward_kernel` wrote.
      weights: the chunks of f, i and d, of the layers L - 1 ... 1, and of the first, transposed; see `Cluster`.
      vectors: `[M, N, 2, 64]`, the LayerNorm's scale and bias.
    """

    d_last: Any
    d_outputs: Any
    scale: Any
    contexts: Any
    states: Any
    outputs: Any
    gates: Any
    moments: Any
    weights: Any
    vectors: Any


class Results(NamedTuple):
    """What the kernel writes.

    Attributes:
      d_pre: d_z_1 ... d_z_(L-1), `[M, L - 1, T, B, H]`.
      d_first: d_z_0, `[M, T, B, H]`.
      d_gates: d_f, d_i and d_d, `[M, T, B, 3 * C]`.
      d_context: d_c_0, `[M, B, C]`.
      d_norm: of scale and bias of the LayerNorm by row, `[M, 2, B, C]`.
    """

    d_pre: Any
    d_first: Any
    d_gates: Any
    d_context: Any
    d_norm: Any


def backward_kernel(inputs: Inputs, results: Results, between: Between, shared: Shared) -> None:
    """All steps backward: d_x is the gradient of x, z_l the pre-activation of h_l; other names as forward.

        unit          = (m - mean(m)) / deviation(m)                           m = m_(t+1), computed again
        d_y           = d_c_(t+1) where |unit * norm_scale + norm_bias| < 10, else 0
        d_scale      += d_y * unit;  d_bias += d_y
        d_unit        = d_y * norm_scale
        d_m           = (d_unit - mean(d_unit) - unit * mean(d_unit * unit)) / deviation(m)
        d_f, d_i, d_d = d_m * c_t * s(f) * (1 - s(f)),  d_m * d * s(i) * (1 - s(i)),  d_m * s(i)     s: sigmoid
        d_h_(L-1)     = [d_f, d_i, d_d] W_gates^T + d_outputs_t
        d_z_l         = scale * d_h_l where h_l > 0, else 0
        d_h_(l-1)     = d_z_l W_l^T                                            l = L - 1 ... 1
        d_c_t         = d_z_0 W_in^T + d_m * s(f)

    A block computes its columns of all of these. Exchanged are the means, d_f, d_i and d_d one after the other, each
    multiplied as soon as it is there, and each d_z_l.

    Gradients of the weights are not computed here: they are products over all steps, of what this kernel writes. Only
    those of the LayerNorm's scale and bias are summed up as they arise.
    """
    _, steps, batch, hidden = inputs.d_outputs.shape
    layers = inputs.states.shape[1] + 1
    group = Cluster(shared, between, inputs.weights, inputs.vectors, batch, steps)
    member, rows, here = group.member, group.rows, group.here
    scale = inputs.scale[member, 0]

    def relu_backward(d_state: jax.Array, state: jax.Array) -> jax.Array:
        return jnp.where(state.astype(jnp.float32) > 0, d_state * scale, 0.0)

    def prefetch_gates(t: Any) -> tuple[jax.Array, ...]:
        """c_t, f, i and d."""
        gates = (load(inputs.gates.at[member, t, rows, group.columns(part)]) for part in range(3))
        return load(inputs.contexts.at[member, t, rows, here]), *gates

    def gates_backward(t: Any, d_after: jax.Array, prefetched: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        """d_f, d_i and d_d, and the part of d_c_t that does not come through the layers."""
        context, forget, update, delta = prefetched
        mean, inverse = (load_by_rows(inputs.moments.at[member, t, part, rows]) for part in range(2))
        forget, update = sigmoid(forget), sigmoid(update)
        unit = (forget * context + update * delta - mean) * inverse
        weight = group.vector(0)
        inside = jnp.abs(unit * weight + group.vector(1)) < CONTEXT_BOUND
        d_normed = jnp.where(inside, d_after, 0.0)
        d_unit = d_normed * weight

        def sum_up() -> None:
            for part, gradient in enumerate((d_normed * unit, d_normed)):
                before = load(results.d_norm.at[member, part, rows, here])
                results.d_norm[member, part, rows, here] = before + gradient

        sums = group.exchange_row_values((jnp.sum(d_unit, 1), jnp.sum(d_unit * unit, 1)), sum_up)
        d_mean, along = (by_rows(sum_over_blocks(each) / hidden) for each in sums)
        d_mixed = (d_unit - d_mean - unit * along) * inverse
        d_forget, d_update = d_mixed * context * forget * (1 - forget), d_mixed * delta * update * (1 - update)
        return (d_forget, d_update, d_mixed * update), d_mixed * forget

    def step(back: Any, carry: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        t = steps - 1 - back
        sent, chunk = back * (layers + 3), back * group.chunks
        d_gates, direct = gates_backward(t, *carry)
        d_state = load(inputs.d_outputs.at[member, t, rows, here]).astype(jnp.float32)
        state = load(inputs.outputs.at[member, t, rows, here])

        def gate(part: Any, d_state: jax.Array) -> jax.Array:
            gradient = lax.switch(part, [lambda: d_gates[0], lambda: d_gates[1], lambda: d_gates[2]])
            place = results.d_gates.at[member, t, rows, group.columns(part)]
            group.exchange(sent + part, gradient, to(place))
            return d_state + group.product(sent + part, chunk + part * group.per_product)

        d_state = lax.fori_loop(0, 3, gate, d_state)

        def send(above: Any, d_state: jax.Array, state: jax.Array, place: Any, meanwhile: Any) -> tuple[jax.Array, Any]:
            """Sends d_z of the layer that has `above` layers above it, and multiplies it: d_h of the layer below."""
            d_pre = relu_backward(d_state, state)
            found = group.exchange(sent + 3 + above, d_pre, to(place), meanwhile)
            return group.product(sent + 3 + above, chunk + (3 + above) * group.per_product), found

        def hidden_layer(above: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
            below = layers - 2 - above
            below_state = inputs.states.at[member, below, t, rows, here]
            return send(above, *carry, results.d_pre.at[member, below, t, rows, here], lambda: load(below_state))

        d_state, state = lax.fori_loop(0, layers - 1, hidden_layer, (d_state, state))
        earlier = jnp.maximum(t - 1, 0)
        first = results.d_first.at[member, t, rows, here]
        x, prefetched = send(layers - 1, d_state, state, first, lambda: prefetch_gates(earlier))
        return x + direct, prefetched

    for part in range(2):  # by the threads that add to them
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
        results.d_norm[member, part, rows, here] = zeros
    carry = load(inputs.d_last.at[member, rows, here]), prefetch_gates(steps - 1)
    d_context, _ = lax.fori_loop(0, steps, step, carry)
    results.d_context[member, rows, here] = d_context
    group.finish()
