"""A probe: a small network that predicts from a hidden state what the hard path will gain on a token.

    gain(h) = w . silu(W n(h) + b) + c         n(h): h divided by its root mean square;  W [H, 64]

A prediction's entropy needs the head, which costs a SmolLM2-135M as much as 8 of its 30 layers; a probe costs a
hundredth of a layer, and learns what the decision is about: the loss of the easy path less that of the hard one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.cascade.states import release
from newllm_jax.smollm.flops import PROBE_WIDTH
from newllm_jax.smollm.model import rms_norm
from newllm_jax.training.precision import dot
from newllm_jax.training.split import batches, epoch_order
from newllm_jax.training.step import Params

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 10, 512, 1e-3, 0.1
LARGEST_BLOCK = 2**30  # bytes of hidden states on the device; with more of them they come there a part at a time
LARGEST_GAIN = 4.0  # nats; larger ones are rare, and noise of single tokens


def init_probe(hidden_size: int, seed: int) -> Params:
    """The parameters at the start, whose prediction is 0."""
    drawn = jax.random.normal(jax.random.key(seed), (hidden_size, PROBE_WIDTH)) * hidden_size**-0.5
    return {
        "inner": {"kernel": drawn, "bias": jnp.zeros(PROBE_WIDTH)},
        "outer": {"kernel": jnp.zeros((PROBE_WIDTH, 1)), "bias": jnp.zeros(1)},
    }


def probe_gains(probe: Params, hidden: jax.Array) -> jax.Array:
    """The predicted gains (nats) `[...]` of tokens from what the probe reads, `hidden [..., H]`."""
    x = rms_norm(hidden, jnp.ones(()), 1e-5)
    inner, outer = probe["inner"], probe["outer"]
    x = jax.nn.silu(dot(x, inner["kernel"], "fp32") + inner["bias"])
    return (dot(x, outer["kernel"], "fp32") + outer["bias"])[..., 0]


def train_probe(hidden: np.ndarray, gains: np.ndarray, seed: int, largest: float = LARGEST_GAIN) -> Params:
    """A probe trained by the squared error of its gains, with AdamW and a cosine schedule.

    Args:
      hidden: `[tokens, H]`; perhaps a memory-mapped file.
      gains: `[tokens]`, nats.
      largest: what a larger gain, or loss, counts as.
    """
    target = np.clip(gains, -largest, largest)
    batch = min(BATCH, len(target))
    # Left-over tokens of an epoch are left out: with another order every epoch, never the same ones.
    steps = len(target) // batch
    epochs = (
        batches(epoch_order(seed, epoch, len(target))[: steps * batch], batch) for epoch in range(1, EPOCHS + 1)
    )  # fmt: skip
    probe = init_probe(hidden.shape[1], seed)
    probe["outer"]["bias"] = jnp.full(1, float(np.mean(target)))
    state = probe, _optimizer(EPOCHS * steps).init(probe)
    if hidden.nbytes <= LARGEST_BLOCK:
        blocks = iter([(hidden, target, np.concatenate(list(epochs)))])
    else:
        blocks = (block for order in epochs for block in _blocks(hidden, target, order))
    for block in blocks:
        state = _updates(state, *map(jnp.asarray, block), EPOCHS * steps)
    return jax.device_get(state[0])


def _blocks(
    hidden: np.ndarray, target: np.ndarray, order: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """An epoch's batches `[steps, B]` in parts, each with only the tokens that it needs."""
    batch = order.shape[1]
    size = max(1, LARGEST_BLOCK // (batch * hidden[0].nbytes))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        places = np.arange(part.size, dtype=np.int32).reshape(part.shape)
        yield hidden[part.ravel()], target[part.ravel()], places
        release(hidden)


def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=WEIGHT_DECAY)


@partial(jax.jit, donate_argnums=0, static_argnums=4)
def _updates(state: Any, hidden: jax.Array, target: jax.Array, orders: jax.Array, steps: int) -> Any:
    """The updates of some batches `orders [updates, B]` among `steps` of them in all."""
    optimizer = _optimizer(steps)

    def error(probe: Params, batch: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(probe_gains(probe, hidden[batch]) - target[batch]))

    def update(state: tuple[Params, Any], batch: jax.Array) -> tuple[tuple[Params, Any], None]:
        probe, moments = state
        changes, moments = optimizer.update(jax.grad(error)(probe, batch), moments, probe)
        return (optax.apply_updates(probe, changes), moments), None

    return jax.lax.scan(update, state, orders)[0]
