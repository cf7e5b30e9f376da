"""A stage's update through the GPU kernels of `kernels.py`: the same as `train_step`, with fewer bytes moved.

    1. forward   blocks (`single_token.forward`), final norm, logits, mean cross-entropy
    2. backward  the same, from the logits to the input; the gradient of every kernel stays in two factors
    3. AdamW     kernels and embedding from those factors, the norms' scales by Optax

`updates.kernel_obstacle` says where it cannot be used.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from newllm_jax.cascade.stage import kernels, single_token
from newllm_jax.cascade.stage.model import Stage
from newllm_jax.config import CascadeConfig
from newllm_jax.smollm.model import rms_norm
from newllm_jax.training.losses import summed_losses
from newllm_jax.training.precision import PRECISIONS
from newllm_jax.training.step import Totals, TrainState

Path: TypeAlias = tuple[str, ...]  # of an array in the parameters
Factors: TypeAlias = dict[Path, tuple[jax.Array, jax.Array]]  # those of `single_token.Gradients.kernel_factors`

BLOCKS, FINAL_NORM, EMBEDDING = ("backbone", "blocks"), ("backbone", "norm", "scale"), ("embed", "embedding")


def stage_step(
    stage: Stage,
    config: CascadeConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    present: jax.Array,
    key: jax.Array,
    interpret: bool = False,
) -> tuple[TrainState, Totals]:
    """One update: that of `train_step` with `next_token_loss` and this optimiser.

    Args:
      config: has the learning rate and the weight decay, which the kernel of AdamW needs as numbers.
      optimizer: `training.optimizer.adamw` of those two. It is needed as well, because an Optax transformation keeps
        its settings to itself: it updates the norms' scales and counts the updates.
      batch: `hidden [B, H]` and `targets [B]`.
      present: bool `[B]`; absent tokens have no loss.
      key: unused, there is no dropout.
      interpret: without a GPU, for tests.
    """
    hidden, targets = batch
    llama, precision = stage.config, PRECISIONS[stage.precision]
    options = {"precision": precision, "interpret": interpret}
    products = single_token.Products(
        partial(kernels.forward, epsilon=llama.rms_norm_eps, **options),
        partial(kernels.backward, **options),
        partial(kernels.norm_backward, epsilon=llama.rms_norm_eps, **options),
    )
    dot = partial(jnp.dot, precision=precision)
    params = _flat(state.params)
    blocks, embedding = state.params["backbone"]["blocks"], params[EMBEDDING]

    residual, residuals = single_token.forward(llama, products, blocks, hidden)
    final_norm = partial(rms_norm, epsilon=llama.rms_norm_eps)
    last, norm_backward = jax.vjp(final_norm, residual, params[FINAL_NORM])
    logits = dot(last, embedding.T)

    d_logits, sums = jax.grad(_mean_loss, has_aux=True)(logits, targets, present)
    d_residual, d_final_scale = norm_backward(dot(d_logits, embedding))
    gradients = single_token.backward(llama, products, blocks, residuals, d_residual)

    paths = {name: (*BLOCKS, *path, "kernel") for name, path in single_token.KERNELS.items()}
    factors: Factors
    factors = {paths[name]: pair for name, pair in gradients.kernel_factors.items()}
    factors[EMBEDDING] = d_logits[None], last[None]
    scales: dict[Path, jax.Array]
    scales = {(*BLOCKS, name, "scale"): gradient for name, gradient in gradients.norm_scales.items()}
    scales[FINAL_NORM] = d_final_scale
    after, gradient_norm = _adamw(config, optimizer, state, factors, scales, options)
    return after, Totals(sums, gradient_norm)


def _adamw(
    config: CascadeConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    factors: Factors,
    scales: dict[Path, jax.Array],
    options: Any,
) -> tuple[TrainState, jax.Array]:
    """The state after an update by AdamW, and the gradient's norm.

    Args:
      factors: of the gradients of kernels and embedding, `[L, B, in]` and `[L, B, out]`: `kernels.adamw`.
      scales: the gradients of the norms' scales, for `optimizer`. It is called with their part of the moments; the
        count of updates, which comes first in its state, is the one of all parameters.
      options: of the GPU kernels.
    """
    adam: Any
    adam, *others = cast(Any, state.opt_state)
    params, means, squares = _flat(state.params), _flat(adam.mu), _flat(adam.nu)
    # Queries and keys have no gradient, ever: their moments stay 0, and only the decay changes them.
    for path in sorted(params.keys() - factors.keys() - scales.keys()):
        params[path] += -config.learning_rate * (config.weight_decay * params[path])

    old_scales, scale_means, scale_squares = (
        {path: tree[path] for path in scales} for tree in (params, means, squares)
    )
    updates, (adam, *others) = cast(
        Any, optimizer.update(scales, (adam._replace(mu=scale_means, nu=scale_squares), *others), old_scales)
    )
    params |= cast(Any, optax.apply_updates(old_scales, updates))
    means |= adam.mu
    squares |= adam.nu

    sums_of_squares = [jnp.square(gradient).ravel() for gradient in scales.values()]
    for path, (x, d_y) in factors.items():
        shape = params[path].shape
        before = kernels.ParameterAndMoments(
            *(tree[path].reshape(-1, *shape[-2:]) for tree in (params, means, squares))
        )
        after, by_tile = kernels.adamw(
            before, x, d_y, adam.count, learning_rate=config.learning_rate, weight_decay=config.weight_decay, **options
        )
        params[path], means[path], squares[path] = (array.reshape(shape) for array in after)
        sums_of_squares.append(by_tile.ravel())

    adam = adam._replace(mu=unflatten_dict(means), nu=unflatten_dict(squares))
    new_state = replace(state, params=unflatten_dict(params), opt_state=cast(Any, (adam, *others)))
    return new_state, jnp.sqrt(jnp.sum(jnp.concatenate(sums_of_squares)))


def _flat(tree: Any) -> dict[Path, jax.Array]:
    return cast(dict[Path, jax.Array], flatten_dict(tree))


def _mean_loss(logits: jax.Array, targets: jax.Array, present: jax.Array) -> tuple[jax.Array, Any]:
    """The mean cross-entropy (nats) of the tokens that are present, and the sums it was computed from."""
    sums = summed_losses(logits, targets, present)
    return sums.loss / jnp.maximum(sums.count, 1).astype(jnp.float32), sums
