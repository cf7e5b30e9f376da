"""A probe: a small network that predicts from a hidden state what the hard path will gain on a token.

    gain(h) = w . silu(W n(h) + b) + c         n(h): h divided by its root mean square;  W [H, 64]

A prediction's entropy needs the head, which costs a SmolLM2-135M as much as 8 of its 30 layers; a probe costs a
hundredth of a layer, and learns what the decision is about: the loss of the easy path less that of the hard one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from newllm_jax.smollm.flops import PROBE_WIDTH
from newllm_jax.smollm.model import rms_norm
from newllm_jax.training.precision import dot
from newllm_jax.training.split import batches, epoch_order
from newllm_jax.training.step import Params

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 10, 512, 1e-3, 0.1
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
      hidden: `[tokens, H]`.
      gains: `[tokens]`, nats.
      largest: what a larger gain, or loss, counts as.
    """
    target = np.clip(gains, -largest, largest)
    batch = min(BATCH, len(target))
    # Left-over tokens of an epoch are left out: with another order every epoch, never the same ones.
    steps = len(target) // batch
    orders = np.concatenate([
        batches(epoch_order(seed, epoch, len(target))[: steps * batch], batch) for epoch in range(1, EPOCHS + 1)
    ])  # fmt: skip
    probe = init_probe(hidden.shape[1], seed)
    probe["outer"]["bias"] = jnp.full(1, float(np.mean(target)))
    return jax.device_get(_updates(probe, jnp.asarray(hidden), jnp.asarray(target), jnp.asarray(orders)))


@partial(jax.jit, donate_argnums=0)
def _updates(probe: Params, hidden: jax.Array, target: jax.Array, orders: jax.Array) -> Params:
    rate = optax.cosine_decay_schedule(LEARNING_RATE, orders.shape[0])
    optimizer = optax.adamw(rate, weight_decay=WEIGHT_DECAY)

    def error(probe: Params, batch: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(probe_gains(probe, hidden[batch]) - target[batch]))

    def update(state: tuple[Params, Any], batch: jax.Array) -> tuple[tuple[Params, Any], None]:
        probe, moments = state
        changes, moments = optimizer.update(jax.grad(error)(probe, batch), moments, probe)
        return (optax.apply_updates(probe, changes), moments), None

    return jax.lax.scan(update, (probe, optimizer.init(probe)), orders)[0][0]
