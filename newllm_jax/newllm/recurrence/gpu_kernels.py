"""The GPU kernels of the time loop: a whole text in one launch each way, instead of dozens of launches a step.

Texts are independent, so a *group* of thread blocks takes some rows of the batch through all steps by itself. Within a
layer each block computes its own share of the columns; then the group meets at a counter in device memory, since the
next layer reads all of them. What the others need not see by then is written, and what none of them writes is loaded,
between a block's arrival and the end of its wait.

Written for Pallas's Triton backend. Every address is written once and read after a meeting only, so that no cache of a
multiprocessor can hold what it was before; but for the sums that a block keeps for itself. `fused.py` calls these; the
equations are in `cell.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from newllm_jax.newllm.recurrence.cell import CONTEXT_BOUND, LAYER_NORM_EPSILON, dropout_mask
from newllm_jax.newllm.recurrence.gpu_group import Group, Tiling


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def forward_kernel(
    tokens, seeds, context, w_in, w_hidden, b_hidden, w_gates, b_gates, norm_scale, norm_bias, _,
    contexts, states, outputs, gates, last, mixed, means, squares, counters,
    *, tiling: Tiling, batch: int, dropout: float, precision: Any, alone: bool,
):  # fmt: skip
    """All steps forward: references to the inputs, then to the results, as `fused.forward` lists them.

    `filled` is the batch with the rows that fill up a group; kernels of weights are `[out, in]`. `states` are of all
    layers but the last, whose are `outputs`. `means` and `squares`
    are of each block's share of `mixed`, the context before its LayerNorm. The last input is the counters' memory,
    which is that of the last result.
    """
    steps, filled, hidden = tokens.shape
    width, layers = context.shape[-1], states.shape[0] + 1
    group = Group(tiling, counters, alone, precision, filled // tiling.rows)
    rows, here, own = group.rows, group.columns(hidden), group.columns(width)
    share = width // tiling.blocks

    pair = seeds[0], seeds[1]
    row_numbers = (group.index * tiling.rows + jax.lax.iota(jnp.int32, tiling.rows)) * hidden
    column_numbers = group.number * (hidden // tiling.blocks) + jax.lax.iota(jnp.int32, hidden // tiling.blocks)
    numbers = (row_numbers[:, None] + column_numbers[None, :]).astype(jnp.uint32)

    def drawn(layer, t):
        """The mask of dropout, as `cell.step` numbers the activations."""
        if not dropout:
            return None
        return dropout_mask(pair, dropout, numbers + ((t * layers + layer) * (batch * hidden)).astype(jnp.uint32))

    def activate(x, kept, layer, t):
        x = jnp.maximum(x, 0.0)
        x = x if kept is None else jnp.where(kept, x * (1 / (1 - dropout)), 0.0)
        x = x.astype(states.dtype)

        @pl.when(layer < layers - 1)
        def _():
            states[layer, t, rows, here] = x

        @pl.when(layer == layers - 1)
        def _():
            outputs[t, rows, here] = x

    def statistics(t):
        """Mean and 1 / deviation of `mixed[t]`, from those of the blocks' shares (Chan et al. 1979)."""
        shares = means[t, rows, :]
        mean = jnp.sum(shares, 1) / tiling.blocks
        off = shares - mean[:, None]
        square = jnp.sum(squares[t, rows, :] + share * off * off, 1) / width
        return mean[:, None], jax.lax.rsqrt(square + LAYER_NORM_EPSILON)[:, None]

    def normed(t, part, mean, inverse):
        """The context before step t; before the first it is given, not normed."""
        x = mixed[t, rows, part]
        y = (x - mean) * inverse * norm_scale[part][None, :] + norm_bias[part][None, :]
        return jnp.where(t > 0, jnp.clip(y, -CONTEXT_BOUND, CONTEXT_BOUND), x)

    def keep_mixed(t, x):
        mixed[t, rows, own] = x
        mean = (jnp.sum(x, 1) / share)[:, None]
        means[t, rows, pl.ds(group.number, 1)] = mean
        squares[t, rows, pl.ds(group.number, 1)] = jnp.sum((x - mean) * (x - mean), 1)[:, None]

    def first_needs(t):
        return tokens[t, rows, here].astype(jnp.float32), drawn(0, t)

    def step(t, carry):
        arrivals, zero, (token, kept) = carry
        now = t + zero
        mean, inverse = statistics(now)
        [x] = group.product(
            lambda k: normed(now, k, mean, inverse).astype(states.dtype), [lambda k: w_in[here, k]], width,
            hidden // tiling.blocks,
        )  # fmt: skip
        activate(x + token, kept, 0, t)

        def keep_context():
            contexts[t, rows, own] = normed(now, own, mean, inverse)
            return b_hidden[0, here], drawn(1, t)

        carry = group.meet(arrivals, keep_context)

        def layer(index, carry):
            arrivals, zero, (bias, kept) = carry
            [x] = group.product(
                lambda k: states[index, t + zero, rows, k], [lambda k: w_hidden[index, here, k]], hidden,
                hidden // tiling.blocks,
            )  # fmt: skip
            activate(x + bias[None, :], kept, index + 1, t)
            above = jnp.minimum(index + 1, layers - 2)
            return group.meet(arrivals, lambda: (b_hidden[above, here], drawn(index + 2, t)))

        arrivals, zero, _ = jax.lax.fori_loop(0, layers - 1, layer, carry)
        before = contexts[t + zero, rows, own]
        parts = [group.columns(width, part) for part in range(3)]
        products = group.product(
            lambda k: outputs[t + zero, rows, k],
            [lambda k, part=part: w_gates[part, k] for part in parts], hidden, share,
        )  # fmt: skip
        forget, update, delta = (x + b_gates[part][None, :] for x, part in zip(products, parts, strict=True))
        keep_mixed(t + 1, _sigmoid(forget) * before + _sigmoid(update) * delta)

        def keep_gates():
            for part, x in zip(parts, (forget, update, delta), strict=True):
                gates[t, rows, part] = x
            return first_needs(jnp.minimum(t + 1, steps - 1))

        return group.meet(arrivals, keep_gates)

    keep_mixed(0, context[rows, own])
    _, zero, _ = jax.lax.fori_loop(0, steps, step, group.meet(jnp.int32(0), lambda: first_needs(jnp.int32(0))))
    last[rows, own] = normed(steps + zero, own, *statistics(steps + zero))


def backward_kernel(
    d_last, d_outputs, contexts, states, outputs, gates, w_in, w_hidden, w_gates, norm_scale, norm_bias, _,
    d_pre, d_first, d_gates, d_direct, d_contexts, d_norm, counters,
    *, tiling: Tiling, scale: float, precision: Any, alone: bool,
):  # fmt: skip
    """All steps backward, as `fused.backward` lists them; kernels of weights are `[in, out]`.

    `d_pre` holds the gradients of the pre-activations of all layers but the first, whose are `d_first`; `d_direct` is
    the part of the context's gradient that does not come through the layers; `d_norm` are the gradients of scale and
    bias of the LayerNorm, summed over the steps.
    """
    steps, batch, hidden = d_outputs.shape
    width, layers = d_last.shape[-1], states.shape[0] + 1
    group = Group(tiling, counters, alone, precision, batch // tiling.rows)
    rows, own_rows, here, own = group.rows, group.own_rows, group.columns(hidden), group.columns(width)

    def norm_needs(t):
        parts = [gates[t, own_rows, pl.ds(part * width, width)] for part in range(3)]
        return contexts[t, own_rows, :], parts, [d_norm[part, own_rows, :] for part in range(2)]

    def through_norm(d_after, t, needs):
        """Gradients of the gates of step t and, but for the first layer's part, of the context before it."""
        context, (forget, update, delta), sums = needs
        forget, update = _sigmoid(forget), _sigmoid(update)
        x = forget * context + update * delta
        centred = x - (jnp.sum(x, -1) / width)[:, None]
        inverse = jax.lax.rsqrt(jnp.sum(centred * centred, -1) / width + LAYER_NORM_EPSILON)[:, None]
        unit = centred * inverse
        weight = norm_scale[:][None, :]
        inside = jnp.abs(unit * weight + norm_bias[:][None, :]) < CONTEXT_BOUND
        d_normed = jnp.where(inside, d_after, 0.0)
        for part, x in enumerate((d_normed * unit, d_normed)):
            d_norm[part, own_rows, :] = x + jnp.where(t < steps - 1, sums[part], 0.0)
        d_unit = d_normed * weight
        mean, along = jnp.sum(d_unit, -1) / width, jnp.sum(d_unit * unit, -1) / width
        d_mixed = (d_unit - mean[:, None] - unit * along[:, None]) * inverse
        d_forget, d_update = d_mixed * context * forget * (1 - forget), d_mixed * delta * update * (1 - update)
        for part, x in enumerate((d_forget, d_update, d_mixed * update)):
            d_gates[t, own_rows, pl.ds(part * width, width)] = x.astype(d_gates.dtype)
        d_direct[t, own_rows, :] = d_mixed * forget

    def through_layer(gradient, passed):
        return jnp.where(passed, gradient * scale, 0.0).astype(d_pre.dtype)

    def below(index, t, zero):
        """The gradient of the activations of layer `index`, from that of the layer above."""
        [x] = group.product(
            lambda k: d_pre[index, t + zero, rows, k], [lambda k: w_hidden[index, here, k]], hidden,
            hidden // tiling.blocks,
        )  # fmt: skip
        return x

    def passed(layer, t):
        return states[layer, t, rows, here] > 0  # where ReLU passed it and dropout kept it

    def last_needs(t):
        return d_outputs[t, rows, here].astype(jnp.float32), outputs[t, rows, here] > 0

    def step(back, carry):
        arrivals, zero, (d_output, mask) = carry
        t = steps - 1 - back
        [x] = group.product(
            lambda k: d_gates[t + zero, rows, k], [lambda k: w_gates[here, k]], 3 * width, hidden // tiling.blocks
        )
        d_pre[layers - 2, t, rows, here] = through_layer(x + d_output, mask)
        carry = group.meet(arrivals, lambda: passed(layers - 2, t))

        def layer(down, carry):
            arrivals, zero, mask = carry
            index = layers - 2 - down
            d_pre[index - 1, t, rows, here] = through_layer(below(index, t, zero), mask)
            return group.meet(arrivals, lambda: passed(index - 1, t))

        arrivals, zero, mask = jax.lax.fori_loop(0, layers - 2, layer, carry)
        d_first[t, rows, here] = through_layer(below(0, t, zero), mask)
        arrivals, zero, _ = group.meet(arrivals)
        [x] = group.product(
            lambda k: d_first[t + zero, rows, k], [lambda k: w_in[own, k]], hidden, width // tiling.blocks
        )
        d_contexts[t, rows, own] = x + d_direct[t + zero, rows, own]
        earlier = jnp.maximum(t - 1, 0)
        arrivals, zero, needs = group.meet(arrivals, lambda: norm_needs(earlier))

        @pl.when(t > 0)
        def _():
            through_norm(d_contexts[t + zero, own_rows, :], earlier, needs)

        return group.meet(arrivals, lambda: last_needs(earlier))

    through_norm(d_last[own_rows, :], steps - 1, norm_needs(steps - 1))
    jax.lax.fori_loop(0, steps, step, group.meet(jnp.int32(0), lambda: last_needs(steps - 1)))
