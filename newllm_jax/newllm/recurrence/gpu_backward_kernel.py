"""The GPU kernel of the time loop backward: a whole text in one launch. Shapes and groups as in the forward kernel.

Written for Pallas's Triton back end. `gpu.py` calls this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from newllm_jax.newllm.recurrence.cell import CONTEXT_BOUND, NORM_EPSILON
from newllm_jax.newllm.recurrence.gpu_forward_kernel import inverse_rms
from newllm_jax.newllm.recurrence.gpu_group import Group, sigmoid
from newllm_jax.newllm.recurrence.gpu_tiling import Tiling


class Inputs(NamedTuple):
    """What the kernel reads, of each member.

    Attributes:
      d_last: d_c_T, `[B, C]`.
      d_outputs: `[T, B, H]`, of `outputs` by the loss, not through the later steps.
      scale: `[1]`, `CellDropout.scale`.
      contexts, states, outputs, gates: what `forward_kernel` wrote.
      w_in, w_hidden, w_gates: `[C, H]`, `[L - 1, H, H]`, `[H, 3 * C]`: kernels as `[in, out]`, the `[out, in]` of their
        transposes.
      norm_scale, norm_bias: `[C]`.
      activations, state_squares: what `forward_kernel` wrote; None in a plain cell, as what follows.
      b_hidden: `[L - 1, H]`.
    """

    d_last: Any
    d_outputs: Any
    scale: Any
    contexts: Any
    states: Any
    outputs: Any
    gates: Any
    w_in: Any
    w_hidden: Any
    w_gates: Any
    norm_scale: Any
    norm_bias: Any
    activations: Any = None
    state_squares: Any = None
    b_hidden: Any = None


class Results(NamedTuple):
    """What the kernel writes.

    Attributes:
      d_pre: d_z_1 ... d_z_(L-1), `[L - 1, T, B, H]`.
      d_first: d_z_0, `[T, B, H]`.
      d_gates: d_f, d_i and d_d, `[T, B, 3 * C]`.
      d_direct: direct_t, the part of d_c_t that does not come through the layers, `[T, B, C]`.
      d_contexts: d_c_t, `[T, B, C]`.
      d_norm: of scale and bias of the LayerNorm by row, `[2, B, C]`. The one array that is overwritten: only the block
        that wrote a sum uses what it reads of it.
      along: of each block's columns the sum of d_z_l * (x_l W_l), `[L - 1, T, B, N']`; None in a plain cell.
    """

    d_pre: Any
    d_first: Any
    d_gates: Any
    d_direct: Any
    d_contexts: Any
    d_norm: Any
    along: Any = None


def backward_kernel(
    inputs: Inputs, results: Results, counters: Any, *, tiling: Tiling, precision: Any, alone: bool,
) -> None:  # fmt: skip
    """All steps backward: d_x is the gradient of x, z_l the pre-activation of a_l; the other names of `forward_kernel`.

        d_f, d_i, d_d = norm_backward(d_c_(t+1))                               see there; and direct_t
        d_h_(L-1)     = [d_f, d_i, d_d] W_gates^T + d_outputs_t
        d_z_l         = scale * d_h_l where a_l > 0, else 0
        d_x_l         = d_z_l W_l^T                                            l = L - 1 ... 1
          plain         d_h_(l-1) = d_x_l
          residual      d_h_(l-1) = d_h_l + r_(l-1) * (d_x_l - x_l * mean(d_x_l * x_l))
        d_c_t         = d_z_0 W_in^T + direct_t

    The mean is over whole rows, but known before the product that gives d_x_l:

        sum_j d_x_j x_j = sum_k d_z_k (sum_j x_j W_jk) = sum_k d_z_k (z_k - b_k),   z_k = a_k / scale where d_z_k != 0

    Gradients of the weights are not computed here: they are products over all steps, of what this kernel writes. Only
    those of the LayerNorm's scale and bias are summed up as they arise.

    Before the first step back, each block does phase 5 for the last step. Step t, from T - 1 to 0, has L + 2 phases.
    Each ends with a barrier, because the next one reads what other blocks have computed:

      1. d_z_(L-1), its own columns. While waiting: what the forward pass stored of the layer below.
      2. d_z_l, for l = L - 2 ... 1, each with its barrier. While waiting: the same.
      3. d_z_0.
      4. d_c_t, its own columns. While waiting: what phase 5 reads of the forward pass, and its own sums in `d_norm`.
      5. The gates' gradients and direct_(t-1) from d_c_t, for t > 0. LayerNorm's means are over whole rows, so here a
         block has rows of its own, with all their columns; with more blocks than rows, the last blocks have none. While
         waiting: d_outputs_(t-1) and what was stored of the last layer.

    Args:
      counters: of the barriers, see `Group`.
    """
    members, _, padded_batch, _ = inputs.d_outputs.shape
    group = Group(tiling, counters, alone, precision, members, padded_batch)
    inputs, results = group.member_references(inputs), group.member_references(results)
    d_last, d_outputs, dropout_scale, contexts, states, outputs, gates, w_in, w_hidden, w_gates, *more = inputs
    norm_scale, norm_bias, activations, state_squares, b_hidden = more
    d_pre, d_first, d_gates, d_direct, d_contexts, d_norm, along = results
    residual = activations is not None
    scale = dropout_scale[0]
    steps, _, hidden = d_outputs.shape
    width, layers = d_last.shape[-1], states.shape[0] + 1
    rows, own_rows, here, own = group.rows, group.own_rows, group.columns(hidden), group.columns(width)
    hidden_share, share = hidden // tiling.blocks, width // tiling.blocks

    def prefetch_norm(t):
        """Inputs of `norm_backward`, but for d_after."""
        parts = [gates[t, own_rows, pl.ds(part * width, width)] for part in range(3)]
        return contexts[t, own_rows, :], parts, [d_norm[part, own_rows, :] for part in range(2)]

    def norm_backward(d_after, t, prefetched):
        """Phase 5, of step t: from d_after = d_c_(t+1) back to the gates.

        unit     = (m - mean(m)) / deviation(m)                m = m_(t+1), computed again
        d_y      = d_after where |unit * norm_scale + norm_bias| < 10, else 0
        d_scale += d_y * unit;  d_bias += d_y
        d_unit   = d_y * norm_scale
        d_m      = (d_unit - mean(d_unit) - unit * mean(d_unit * unit)) / deviation(m)
        d_f      = d_m * c_t * s(f) * (1 - s(f))               s: sigmoid
        d_i      = d_m * d * s(i) * (1 - s(i))
        d_d      = d_m * s(i)
        direct_t = d_m * s(f)
        """
        context, (forget, update, delta), sums = prefetched
        forget, update = sigmoid(forget), sigmoid(update)
        mixed = forget * context + update * delta
        centred = mixed - (jnp.sum(mixed, -1) / width)[:, None]
        inverse = jax.lax.rsqrt(jnp.sum(centred * centred, -1) / width + NORM_EPSILON)[:, None]
        unit = centred * inverse
        weight = norm_scale[:][None, :]
        inside = jnp.abs(unit * weight + norm_bias[:][None, :]) < CONTEXT_BOUND
        d_normed = jnp.where(inside, d_after, 0.0)
        for part, gradient in enumerate((d_normed * unit, d_normed)):
            d_norm[part, own_rows, :] = gradient + jnp.where(t < steps - 1, sums[part], 0.0)  # no sums at first
        d_unit = d_normed * weight
        mean, along = jnp.sum(d_unit, -1) / width, jnp.sum(d_unit * unit, -1) / width
        d_mixed = (d_unit - mean[:, None] - unit * along[:, None]) * inverse
        d_forget, d_update = d_mixed * context * forget * (1 - forget), d_mixed * delta * update * (1 - update)
        for part, gradient in enumerate((d_forget, d_update, d_mixed * update)):
            d_gates[t, own_rows, pl.ds(part * width, width)] = gradient.astype(d_gates.dtype)
        d_direct[t, own_rows, :] = d_mixed * forget

    def stored(layer, t):
        """What layer l - 1 needs of the forward pass, this block's columns: a, and in a residual cell h and r."""
        if not residual:
            return states[layer, t, rows, here], None
        state = states[layer, t, rows, here].astype(jnp.float32)
        return activations[layer, t, rows, here], (state, inverse_rms(group, state_squares, layer, t, hidden))

    def relu_backward(d_state, activation):
        """d_z_l, in the type in which the next product reads it."""
        return jnp.where(activation > 0, d_state * scale, 0.0).astype(d_pre.dtype)

    def store_along(layer, t, d_z, activation, bias):
        """This block's part of sum(d_x_l * x_l), for l = layer + 1."""
        product = activation.astype(jnp.float32) / scale - bias[None, :]
        partial_sum = jnp.sum(jnp.where(activation > 0, d_z.astype(jnp.float32) * product, 0.0), 1)
        along[layer, t, rows, pl.ds(group.rank, 1)] = partial_sum[:, None]

    def d_below(layer, t, zero, d_state, norm):
        """d_h_layer, from d_z and d_h of the layer above (`d_pre` starts with d_z_1): this block's columns."""
        [d_x] = group.product(
            lambda k: d_pre[layer, t + zero, rows, k], [lambda k: w_hidden[layer, here, k]], hidden, hidden_share
        )
        if not residual:
            return d_x
        state, inverse = norm
        mean = (jnp.sum(along[layer, t + zero, rows, group.shares], 1) / hidden)[:, None]
        return d_state + inverse * (d_x - state * inverse * mean)

    def bias_of(layer):
        """b_(layer + 1), this block's columns; only residual cells need it."""
        return b_hidden[layer, here] if residual else None

    def prefetch_step(t):
        """Inputs of phase 1."""
        activation = activations[layers - 1, t, rows, here] if residual else outputs[t, rows, here]
        return d_outputs[t, rows, here].astype(jnp.float32), activation, bias_of(layers - 2)

    def step(back, carry):
        arrivals, zero, (d_output, activation, bias) = carry
        t = steps - 1 - back
        # Phase 1.
        [x] = group.product(lambda k: d_gates[t + zero, rows, k], [lambda k: w_gates[here, k]], 3 * width, hidden_share)
        d_state = x + d_output
        d_z = relu_backward(d_state, activation)
        d_pre[layers - 2, t, rows, here] = d_z
        if residual:
            store_along(layers - 2, t, d_z, activation, bias)
        carry = group.barrier(arrivals, lambda: (stored(layers - 2, t), bias_of(jnp.maximum(layers - 3, 0))))

        def hidden_layer(down, carry):
            """Phase 2: d_z of `layer`, which is not the first."""
            (arrivals, zero, ((activation, norm), bias)), d_state = carry
            layer = layers - 2 - down
            d_state = d_below(layer, t, zero, d_state, norm)
            d_z = relu_backward(d_state, activation)
            d_pre[layer - 1, t, rows, here] = d_z
            if residual:
                store_along(layer - 1, t, d_z, activation, bias)
            below = lambda: (stored(layer - 1, t), bias_of(jnp.maximum(layer - 2, 0)))  # noqa: E731
            return group.barrier(arrivals, below), (d_state if residual else None)

        carry = jax.lax.fori_loop(0, layers - 2, hidden_layer, (carry, d_state if residual else None))
        # Phase 3.
        (arrivals, zero, ((activation, norm), _)), d_state = carry
        d_first[t, rows, here] = relu_backward(d_below(0, t, zero, d_state, norm), activation)
        arrivals, zero, _ = group.barrier(arrivals)
        # Phase 4.
        [x] = group.product(lambda k: d_first[t + zero, rows, k], [lambda k: w_in[own, k]], hidden, share)
        d_contexts[t, rows, own] = x + d_direct[t + zero, rows, own]
        earlier = jnp.maximum(t - 1, 0)
        arrivals, zero, prefetched = group.barrier(arrivals, lambda: prefetch_norm(earlier))

        # Phase 5. Of t = 0 nothing is left to do, but every step has the same barriers.
        @pl.when((t > 0) & group.has_rows)
        def _():
            norm_backward(d_contexts[t + zero, own_rows, :], earlier, prefetched)

        return group.barrier(arrivals, lambda: prefetch_step(earlier))

    @pl.when(group.has_rows)
    def _():
        norm_backward(d_last[own_rows, :], steps - 1, prefetch_norm(steps - 1))

    jax.lax.fori_loop(0, steps, step, group.barrier(jnp.int32(0), lambda: prefetch_step(steps - 1)))
