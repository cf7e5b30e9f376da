"""The GPU kernel of the time loop forward: a whole text in one launch, instead of dozens of launches a step.

Texts are independent, so a group of thread blocks (`gpu_group.py`) takes its rows of the batch through all steps by
itself. A phase is what a group computes between two barriers; within it, each block computes its own columns (or rows).

Shapes follow the legend B batch, T time, H hidden, C context, L layers, N the blocks of a group, and N' those of the
largest groups; they are those of one member of a launch: the arrays of a launch have an axis of members before these.
In the kernels, B is the batch padded to whole groups; values of the padding rows are computed, and dropped by the
caller. Where a shape is of the group or of the block, R are the rows of a group, H/N and C/N the columns of a block.

Written for Pallas's Triton back end. `gpu.py` calls this; `cell.py` has the equations of the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from newllm_jax.newllm.dropout import dropout_mask
from newllm_jax.newllm.recurrence.cell import NORM_EPSILON
from newllm_jax.newllm.recurrence.gpu_group import Group, MixedContexts, sigmoid
from newllm_jax.newllm.recurrence.gpu_tiling import Tiling


class Inputs(NamedTuple):
    """What the kernel reads, of each member.

    Attributes:
      tokens: `[T, B, H]`, the embedding's part of the first layer, its bias included.
      masks: uint32 `[K, 3]`, of each kind of dropout its two seeds and `Rate.least`.
      scale: `[1]`, `CellDropout.scale`.
      context: `[B, C]`.
      w_in, w_hidden, w_gates: `[H, C]`, `[L - 1, H, H]`, `[3 * C, H]`: kernels as `[out, in]`, so that a block's
        columns of a result are whole rows of memory; f, i and d side by side.
      b_hidden, b_gates, norm_scale, norm_bias: `[L - 1, H]`, `[3 * C]`, `[C]`, `[C]`.
    """

    tokens: Any
    masks: Any
    scale: Any
    context: Any
    w_in: Any
    w_hidden: Any
    b_hidden: Any
    w_gates: Any
    b_gates: Any
    norm_scale: Any
    norm_bias: Any


class Results(NamedTuple):
    """What the kernel writes; the backward pass reads all but `last`.

    Attributes:
      contexts: c_t, `[T, B, C]`.
      states: h_0 ... h_(L-2), `[L - 1, T, B, H]`.
      outputs: h_(L-1), `[T, B, H]`.
      gates: f, i and d, `[T, B, 3 * C]`.
      last: c_T, `[B, C]`.
      mixed, means, squares: scratch, see `MixedContexts`.
      activations: a_0 ... a_(L-1), `[L, T, B, H]`; None in a plain cell, whose states they are.
      state_squares: `[L - 1, T, B, N']`, of each block's columns of a state the sum of squares; None in a plain cell.
    """

    contexts: Any
    states: Any
    outputs: Any
    gates: Any
    last: Any
    mixed: Any
    means: Any
    squares: Any
    activations: Any = None
    state_squares: Any = None


def inverse_rms(group: Group, state_squares: Any, layer: Any, t: Any, width: int) -> jax.Array:
    """r_layer, the inverse root mean square of the group's rows of a state: `[R, 1]`."""
    squares = jnp.sum(state_squares[layer, t, group.rows, group.shares], 1)
    return jax.lax.rsqrt(squares / width + NORM_EPSILON)[:, None]


def forward_kernel(
    inputs: Inputs, results: Results, counters: Any,
    *, tiling: Tiling, texts: int, kinds: tuple[bool, bool], precision: Any, alone: bool,
) -> None:  # fmt: skip
    """All steps forward.

        c_t     = clip(LayerNorm(m_t), -10, 10)                c_0 is the input `context`
        a_0     = dropout(ReLU(c_t W_in + tokens_t));          h_0 = a_0
        a_l     = dropout(ReLU(x_l W_l + b_l))                 l = 1 ... L - 1
          plain       x_l = h_(l-1);                           h_l = a_l
          residual    x_l = h_(l-1) * r_(l-1);                 h_l = h_(l-1) + a_l;  r = 1 / sqrt(mean(h^2))
        f, i, d = h_(L-1) W_gates + b_gates                    pre-activations
        m_(t+1) = sigmoid(f) * c_t + sigmoid(i) * d

    Before the first step, each block stores its columns of m_0 = c_0. Step t has L + 1 phases. Each ends with a
    barrier, because a product reads all columns of its left operand and a block has computed only its own:

      1. h_0. Every block normalises all of m_t for its product, slice by slice: no barrier between LayerNorm and layer.
         While waiting: stores its columns of c_t, which it needs in phase 3 and the backward pass reads, loads b_1, and
         draws the dropout mask of h_1.
      2. h_l, for l = 1 ... L - 1, each with its barrier. While waiting: bias and dropout mask of the next layer.
         r is one number a row, so it multiplies the product: (h W) r. The squares of h are summed up by the block that
         has its columns; its columns of h itself stay in registers, in float32.
      3. f, i, d and m_(t+1), all of its own columns. While waiting: stores f, i and d, which only the backward pass
         reads, loads the next step's tokens, and draws the dropout mask of its h_0.

    After the last step, each block normalises its columns of m_T: the last context.

    Args:
      counters: of the barriers, see `Group`.
      texts: of the batch that the dropout masks are drawn for, without padding; `cell.compute_layer` counts likewise.
      kinds: whether there are masks by step, and masks by text.
    """
    members, _, padded_batch, _ = inputs.tokens.shape
    group = Group(tiling, counters, alone, precision, members, padded_batch)
    inputs, results = group.member_references(inputs), group.member_references(results)
    tokens, masks, dropout_scale, context, w_in, w_hidden, b_hidden, w_gates, b_gates, norm_scale, norm_bias = inputs
    contexts, states, outputs, gates, last, mixed, means, squares, activations, state_squares = results
    residual = activations is not None
    steps, _, hidden = tokens.shape
    width, layers = context.shape[-1], states.shape[0] + 1
    rows, here, own = group.rows, group.columns(hidden), group.columns(width)
    mixed_contexts = MixedContexts(group, own, mixed, means, squares, norm_scale, norm_bias)
    hidden_share, share = hidden // tiling.blocks, width // tiling.blocks

    drawn = [[masks[kind, part] for part in range(3)] for kind in range(sum(kinds))]
    scale = dropout_scale[0]
    row_places = (group.first_row + jax.lax.iota(jnp.int32, tiling.rows)) * hidden
    column_places = group.rank * hidden_share + jax.lax.iota(jnp.int32, hidden_share)
    places = (row_places[:, None] + column_places[None, :]).astype(jnp.uint32)

    def layer_mask(layer, t):
        """This block's columns of the dropout mask of a_layer."""
        numbers = [number for number, kind in zip((t * layers + layer, layer), kinds, strict=True) if kind]
        kept = None
        for number, (seed, other, least) in zip(numbers, drawn, strict=True):
            first = jnp.asarray(number * (texts * hidden), jnp.int32).astype(jnp.uint32)
            mask = dropout_mask((seed, other), least, places + first)
            kept = mask if kept is None else kept & mask
        return kept

    def store_state(x, mask, layer, t, below=None):
        """a_layer from its pre-activation, and h_layer: this block's columns. Returns what the next layer adds to."""
        x = jnp.maximum(x, 0.0)
        x = x if mask is None else jnp.where(mask, x * scale, 0.0)
        if residual:
            activations[layer, t, rows, here] = x.astype(activations.dtype)
            x = x if below is None else below + x

        @pl.when(layer < layers - 1)
        def _():
            states[layer, t, rows, here] = x.astype(states.dtype)
            if residual:
                state_squares[layer, t, rows, pl.ds(group.rank, 1)] = jnp.sum(x * x, 1)[:, None]

        @pl.when(layer == layers - 1)
        def _():
            outputs[t, rows, here] = x.astype(outputs.dtype)

        return x if residual else None

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
        state = store_state(x + token, mask, 0, t)

        def meanwhile():
            contexts[t, rows, own] = mixed_contexts.context(now, own, mean, inverse)
            return b_hidden[0, here], layer_mask(1, t)

        return *group.barrier(arrivals, meanwhile), state

    def hidden_layer(index, t, arrivals, zero, prefetched, state):
        """Phase 2, for l = index + 1."""
        bias, mask = prefetched
        [x] = group.product(
            lambda k: states[index, t + zero, rows, k], [lambda k: w_hidden[index, here, k]], hidden, hidden_share
        )
        if residual:
            x = x * inverse_rms(group, state_squares, index, t + zero, hidden)
        state = store_state(x + bias[None, :], mask, index + 1, t, state)
        following = jnp.minimum(index + 1, layers - 2)  # of the last layer none follows: what is loaded is not used
        return *group.barrier(arrivals, lambda: (b_hidden[following, here], layer_mask(index + 2, t))), state

    def gates_and_mixed(t, arrivals, zero):
        """Phase 3."""
        before = contexts[t + zero, rows, own]
        parts = [group.columns(width, part) for part in range(3)]
        kernels = [lambda k, part=part: w_gates[part, k] for part in parts]
        products = group.product(lambda k: outputs[t + zero, rows, k], kernels, hidden, share)
        forget, update, delta = (x + b_gates[part][None, :] for x, part in zip(products, parts, strict=True))
        mixed_contexts.store(t + 1, sigmoid(forget) * before + sigmoid(update) * delta)

        def meanwhile():
            for part, x in zip(parts, (forget, update, delta), strict=True):
                gates[t, rows, part] = x
            return prefetch_step(jnp.minimum(t + 1, steps - 1))

        return group.barrier(arrivals, meanwhile)

    def step(t, carry):
        arrivals, zero, (token, mask) = carry
        carry = first_layer(t, arrivals, zero, token, mask)
        arrivals, zero, _, _ = jax.lax.fori_loop(
            0, layers - 1, lambda index, carry: hidden_layer(index, t, *carry), carry
        )
        return gates_and_mixed(t, arrivals, zero)

    mixed_contexts.store(0, context[rows, own])
    carry = group.barrier(jnp.int32(0), lambda: prefetch_step(jnp.int32(0)))
    _, zero, _ = jax.lax.fori_loop(0, steps, step, carry)
    last[rows, own] = mixed_contexts.context(steps + zero, own, *mixed_contexts.statistics(steps + zero))
