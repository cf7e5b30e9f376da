"""The GPU kernels of the time loop: a whole text in one launch each way, instead of dozens of launches a step.

Texts are independent, so a group of thread blocks (`gpu_group.py`) takes its rows of the batch through all steps by
itself. A phase is what a group computes between two barriers; within it, each block computes its own columns (or rows).

Shapes follow the legend B batch, T time, H hidden, C context, L layers, and N the blocks of a group. In the kernels, B
is the batch padded to whole groups; values of the padding rows are computed, and dropped by the caller. Where a shape
is of the group or of the block, R are the rows of a group, H/N and C/N the columns of a block.

Written for Pallas's Triton back end. `gpu.py` calls these; `cell.py` has the equations of the model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from newllm_jax.newllm.recurrence.cell import CONTEXT_BOUND, LAYER_NORM_EPSILON, dropout_mask
from newllm_jax.newllm.recurrence.gpu_group import Group, MixedContexts, Tiling


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def forward_kernel(
    tokens, seeds, context, w_in, w_hidden, b_hidden, w_gates, b_gates, norm_scale, norm_bias, _,
    contexts, states, outputs, gates, last, mixed, means, squares, counters,
    *, tiling: Tiling, texts: int, dropout: float, precision: Any, alone: bool,
):  # fmt: skip
    """All steps forward.

        c_t     = clip(LayerNorm(m_t), -10, 10)                c_0 is the input `context`
        h_0     = dropout(ReLU(c_t W_in + tokens_t))
        h_l     = dropout(ReLU(h_(l-1) W_l + b_l))             l = 1 ... L - 1
        f, i, d = h_(L-1) W_gates + b_gates                    pre-activations
        m_(t+1) = sigmoid(f) * c_t + sigmoid(i) * d

    Before the first step, each block stores its columns of m_0 = c_0. Step t has L + 1 phases. Each ends with a
    barrier, because a product reads all columns of its left operand and a block has computed only its own:

      1. h_0. Every block normalises all of m_t for its product, slice by slice: no barrier between LayerNorm and layer.
         While waiting: stores its columns of c_t, which it needs in phase 3 and the backward pass reads, loads b_1, and
         draws the dropout mask of h_1.
      2. h_l, for l = 1 ... L - 1, each with its barrier. While waiting: bias and dropout mask of the next layer.
      3. f, i, d and m_(t+1), all of its own columns. While waiting: stores f, i and d, which only the backward pass
         reads, loads the next step's tokens, and draws the dropout mask of its h_0.

    After the last step, each block normalises its columns of m_T: the last context.

    Args:
      tokens: `[T, B, H]`, the embedding's part of the first layer, its bias included.
      seeds: uint32 `[2]`, of the dropout masks.
      context: `[B, C]`.
      w_in, w_hidden, w_gates: `[H, C]`, `[L - 1, H, H]`, `[3 * C, H]`: kernels as `[out, in]`, so that a block's
        columns of a result are whole rows of memory; f, i and d side by side.
      b_hidden, b_gates, norm_scale, norm_bias: `[L - 1, H]`, `[3 * C]`, `[C]`, `[C]`.
      _: the memory of `counters`, zeros.
      contexts: c_t, `[T, B, C]`; from here on results.
      states: h_0 ... h_(L-2), `[L - 1, T, B, H]`.
      outputs: h_(L-1), `[T, B, H]`.
      gates: f, i and d, `[T, B, 3 * C]`.
      last: c_T, `[B, C]`.
      mixed, means, squares: scratch, see `MixedContexts`.
      counters: of the barriers, see `Group`.
      texts: of the batch that the dropout masks are drawn for, without padding; `cell.step` numbers them likewise.
    """
    steps, padded_batch, hidden = tokens.shape
    width, layers = context.shape[-1], states.shape[0] + 1
    group = Group(tiling, counters, alone, precision, padded_batch // tiling.rows)
    rows, here, own = group.rows, group.columns(hidden), group.columns(width)
    mixed_contexts = MixedContexts(group, own, mixed, means, squares, norm_scale, norm_bias)
    hidden_share, share = hidden // tiling.blocks, width // tiling.blocks

    seed_pair = seeds[0], seeds[1]
    row_numbers = (group.index * tiling.rows + jax.lax.iota(jnp.int32, tiling.rows)) * hidden
    column_numbers = group.rank * hidden_share + jax.lax.iota(jnp.int32, hidden_share)
    numbers = (row_numbers[:, None] + column_numbers[None, :]).astype(jnp.uint32)

    def layer_mask(layer, t):
        """This block's columns of the dropout mask of h_layer."""
        if not dropout:
            return None
        first = ((t * layers + layer) * (texts * hidden)).astype(jnp.uint32)
        return dropout_mask(seed_pair, dropout, numbers + first)

    def store_activations(x, mask, layer, t):
        """h_layer from its pre-activation, this block's columns."""
        x = jnp.maximum(x, 0.0)
        x = x if mask is None else jnp.where(mask, x * (1 / (1 - dropout)), 0.0)
        x = x.astype(states.dtype)

        @pl.when(layer < layers - 1)
        def _():
            states[layer, t, rows, here] = x

        @pl.when(layer == layers - 1)
        def _():
            outputs[t, rows, here] = x

    def prefetch_step(t):
        """Inputs of phase 1."""
        return tokens[t, rows, here].astype(jnp.float32), layer_mask(0, t)

    def first_layer(t, arrivals, zero, token, mask):
        """Phase 1."""
        now = t + zero
        mean, inverse = mixed_contexts.statistics(now)
        [x] = group.product(
            lambda k: mixed_contexts.context(now, k, mean, inverse).astype(states.dtype), [lambda k: w_in[here, k]],
            width, hidden_share,
        )  # fmt: skip
        store_activations(x + token, mask, 0, t)

        def meanwhile():
            contexts[t, rows, own] = mixed_contexts.context(now, own, mean, inverse)
            return b_hidden[0, here], layer_mask(1, t)

        return group.barrier(arrivals, meanwhile)

    def hidden_layer(index, t, arrivals, zero, bias, mask):
        """Phase 2, for l = index + 1."""
        [x] = group.product(
            lambda k: states[index, t + zero, rows, k], [lambda k: w_hidden[index, here, k]], hidden, hidden_share
        )
        store_activations(x + bias[None, :], mask, index + 1, t)
        following = jnp.minimum(index + 1, layers - 2)  # of the last layer none follows: what is loaded is not used
        return group.barrier(arrivals, lambda: (b_hidden[following, here], layer_mask(index + 2, t)))

    def gates_and_mixed(t, arrivals, zero):
        """Phase 3."""
        before = contexts[t + zero, rows, own]
        parts = [group.columns(width, part) for part in range(3)]
        kernels = [lambda k, part=part: w_gates[part, k] for part in parts]
        products = group.product(lambda k: outputs[t + zero, rows, k], kernels, hidden, share)
        forget, update, delta = (x + b_gates[part][None, :] for x, part in zip(products, parts, strict=True))
        mixed_contexts.store(t + 1, _sigmoid(forget) * before + _sigmoid(update) * delta)

        def meanwhile():
            for part, x in zip(parts, (forget, update, delta), strict=True):
                gates[t, rows, part] = x
            return prefetch_step(jnp.minimum(t + 1, steps - 1))

        return group.barrier(arrivals, meanwhile)

    def step(t, carry):
        arrivals, zero, (token, mask) = carry
        carry = first_layer(t, arrivals, zero, token, mask)
        arrivals, zero, _ = jax.lax.fori_loop(
            0, layers - 1, lambda index, carry: hidden_layer(index, t, carry[0], carry[1], *carry[2]), carry
        )
        return gates_and_mixed(t, arrivals, zero)

    mixed_contexts.store(0, context[rows, own])
    carry = group.barrier(jnp.int32(0), lambda: prefetch_step(jnp.int32(0)))
    _, zero, _ = jax.lax.fori_loop(0, steps, step, carry)
    last[rows, own] = mixed_contexts.context(steps + zero, own, *mixed_contexts.statistics(steps + zero))


def backward_kernel(
    d_last, d_outputs, contexts, states, outputs, gates, w_in, w_hidden, w_gates, norm_scale, norm_bias, _,
    d_pre, d_first, d_gates, d_direct, d_contexts, d_norm, counters,
    *, tiling: Tiling, scale: float, precision: Any, alone: bool,
):  # fmt: skip
    """All steps backward: d_x is the gradient of x, z_l the pre-activation of h_l; the other names of `forward_kernel`.

        d_f, d_i, d_d = norm_backward(d_c_(t+1))                               see there; and direct_t
        d_h_(L-1)     = [d_f, d_i, d_d] W_gates^T + d_outputs_t
        d_z_l         = scale * d_h_l where h_l > 0, else 0
        d_h_(l-1)     = d_z_l W_l^T                                            l = L - 1 ... 1
        d_c_t         = d_z_0 W_in^T + direct_t

    Gradients of the weights are not computed here: they are products over all steps, of what this kernel writes. Only
    those of the LayerNorm's scale and bias are summed up as they arise.

    Before the first step back, each block does phase 5 for the last step. Step t, from T - 1 to 0, has L + 3 phases.
    Each ends with a barrier, because the next one reads what other blocks have computed:

      1. d_z_(L-1), its own columns. While waiting: the mask h_(L-2) > 0.
      2. d_z_l, for l = L - 2 ... 1, each with its barrier. While waiting: the mask of the layer below.
      3. d_z_0.
      4. d_c_t, its own columns. While waiting: what phase 5 reads of the forward pass, and its own sums in `d_norm`.
      5. The gates' gradients and direct_(t-1) from d_c_t, for t > 0. LayerNorm's means are over whole rows, so here a
         block has rows of its own, with all their columns. While waiting: d_outputs_(t-1) and the mask h_(L-1) > 0.

    Args:
      d_last: d_c_T, `[B, C]`.
      d_outputs: `[T, B, H]`, of `outputs` by the loss, not through the later steps.
      contexts, states, outputs, gates: what `forward_kernel` wrote.
      w_in, w_hidden, w_gates: `[C, H]`, `[L - 1, H, H]`, `[H, 3 * C]`: kernels as `[in, out]`, the `[out, in]` of their
        transposes.
      norm_scale, norm_bias: `[C]`.
      _: the memory of `counters`, zeros.
      d_pre: d_z_1 ... d_z_(L-1), `[L - 1, T, B, H]`; from here on results.
      d_first: d_z_0, `[T, B, H]`.
      d_gates: d_f, d_i and d_d, `[T, B, 3 * C]`.
      d_direct: direct_t, the part of d_c_t that does not come through the layers, `[T, B, C]`.
      d_contexts: d_c_t, `[T, B, C]`.
      d_norm: of scale and bias of the LayerNorm by row, `[2, B, C]`. The one array that is overwritten: only the block
        that wrote a sum reads it.
      counters: of the barriers, see `Group`.
      scale: 1 / (1 - dropout), or 1.
    """
    steps, padded_batch, hidden = d_outputs.shape
    width, layers = d_last.shape[-1], states.shape[0] + 1
    group = Group(tiling, counters, alone, precision, padded_batch // tiling.rows)
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
        forget, update = _sigmoid(forget), _sigmoid(update)
        mixed = forget * context + update * delta
        centred = mixed - (jnp.sum(mixed, -1) / width)[:, None]
        inverse = jax.lax.rsqrt(jnp.sum(centred * centred, -1) / width + LAYER_NORM_EPSILON)[:, None]
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

    def active(layer, t):
        """h_layer > 0, this block's columns: where ReLU and dropout both let it pass."""
        return states[layer, t, rows, here] > 0

    def relu_backward(d_activations, mask):
        """d_z_l, in the type in which the next product reads it."""
        return jnp.where(mask, d_activations * scale, 0.0).astype(d_pre.dtype)

    def d_activations(layer, t, zero):
        """d_h_layer = d_z_(layer + 1) W_(layer + 1)^T, this block's columns; `d_pre` starts with d_z_1."""
        [x] = group.product(
            lambda k: d_pre[layer, t + zero, rows, k], [lambda k: w_hidden[layer, here, k]], hidden, hidden_share
        )
        return x

    def prefetch_step(t):
        """Inputs of phase 1."""
        return d_outputs[t, rows, here].astype(jnp.float32), outputs[t, rows, here] > 0

    def step(back, carry):
        arrivals, zero, (d_output, mask) = carry
        t = steps - 1 - back
        # Phase 1.
        [x] = group.product(lambda k: d_gates[t + zero, rows, k], [lambda k: w_gates[here, k]], 3 * width, hidden_share)
        d_pre[layers - 2, t, rows, here] = relu_backward(x + d_output, mask)
        carry = group.barrier(arrivals, lambda: active(layers - 2, t))

        def hidden_layer(down, carry):
            """Phase 2."""
            arrivals, zero, mask = carry
            layer = layers - 2 - down
            d_pre[layer - 1, t, rows, here] = relu_backward(d_activations(layer, t, zero), mask)
            return group.barrier(arrivals, lambda: active(layer - 1, t))

        arrivals, zero, mask = jax.lax.fori_loop(0, layers - 2, hidden_layer, carry)
        # Phase 3.
        d_first[t, rows, here] = relu_backward(d_activations(0, t, zero), mask)
        arrivals, zero, _ = group.barrier(arrivals)
        # Phase 4.
        [x] = group.product(lambda k: d_first[t + zero, rows, k], [lambda k: w_in[own, k]], hidden, share)
        d_contexts[t, rows, own] = x + d_direct[t + zero, rows, own]
        earlier = jnp.maximum(t - 1, 0)
        arrivals, zero, prefetched = group.barrier(arrivals, lambda: prefetch_norm(earlier))

        # Phase 5. Of t = 0 nothing is left to do, but every step has the same barriers.
        @pl.when(t > 0)
        def _():
            norm_backward(d_contexts[t + zero, own_rows, :], earlier, prefetched)

        return group.barrier(arrivals, lambda: prefetch_step(earlier))

    norm_backward(d_last[own_rows, :], steps - 1, prefetch_norm(steps - 1))
    jax.lax.fori_loop(0, steps, step, group.barrier(jnp.int32(0), lambda: prefetch_step(steps - 1)))
