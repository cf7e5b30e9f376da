"""A stage's update through the GPU kernels of `kernels.py`: what `train_step` does, with fewer bytes moved.

`stage.fusible` says where they can be used.
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
Factors: TypeAlias = dict[Path, tuple[jax.Array, jax.Array]]  # as `single_token.Gradients.kernels` has them

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
    """One update, as `train_step` with `next_token_loss` and this optimiser, the AdamW of the configuration.

    Args:
      batch: `hidden [batch, hidden]` and `targets [batch]`.
      key: of no use, there is no dropout.
      interpret: without a GPU, for tests.
    """
    hidden, targets = batch
    llama, precision = stage.config, PRECISIONS[stage.precision]
    how = {"precision": precision, "interpret": interpret}
    products = single_token.Products(
        partial(kernels.forward, epsilon=llama.rms_norm_eps, **how),
        partial(kernels.backward, **how),
        partial(kernels.backward_normed, epsilon=llama.rms_norm_eps, **how),
    )
    dot = partial(jnp.dot, precision=precision)
    params = _flat(state.params)
    blocks, embedding = state.params["backbone"]["blocks"], params[EMBEDDING]

    residual, kept = single_token.forward(llama, products, blocks, hidden)
    last, through_norm = jax.vjp(lambda x, scale: rms_norm(x, scale, llama.rms_norm_eps), residual, params[FINAL_NORM])
    d_logits, sums = jax.grad(_mean_loss, has_aux=True)(dot(last, embedding.T), targets, present)
    d_residual, d_norm = through_norm(dot(d_logits, embedding))
    found = single_token.backward(llama, products, blocks, kept, d_residual)

    factors: Factors
    factors = {(*BLOCKS, *single_token.KERNELS[name], "kernel"): pair for name, pair in found.kernels.items()}
    factors[EMBEDDING] = d_logits[None], last[None]
    gradients: dict[Path, jax.Array]
    gradients = {(*BLOCKS, name, "scale"): gradient for name, gradient in found.norms.items()}
    gradients[FINAL_NORM] = d_norm
    after, norm = _adamw(config, optimizer, state, factors, gradients, how)
    return after, Totals(sums, norm)


def _adamw(
    config: CascadeConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    factors: Factors,
    gradients: dict[Path, jax.Array],
    how: Any,
) -> tuple[TrainState, jax.Array]:
    """The state after an update, and the gradient's norm: each kernel from its factors, the rest by `optimizer`.

    It is `optimizer.adamw` of the configuration, as `kernels.adamw` is.
    """
    adam: Any
    adam, *others = cast(Any, state.opt_state)
    params, means, squares = _flat(state.params), _flat(adam.mu), _flat(adam.nu)
    for path in sorted(params.keys() - factors.keys() - gradients.keys()):  # queries and keys: no gradient ever
        params[path] += -config.learning_rate * (config.weight_decay * params[path])

    small, small_means, small_squares = ({path: tree[path] for path in gradients} for tree in (params, means, squares))
    updates, (adam, *others) = cast(
        Any, optimizer.update(gradients, (adam._replace(mu=small_means, nu=small_squares), *others), small)
    )
    params |= cast(Any, optax.apply_updates(small, updates))
    means |= adam.mu
    squares |= adam.nu
    squared = [jnp.square(gradient).ravel() for gradient in gradients.values()]
    for path, (operand, d_result) in factors.items():
        shape = params[path].shape
        trained = kernels.Trained(*(tree[path].reshape(-1, *shape[-2:]) for tree in (params, means, squares)))
        trained, sums_of_squares = kernels.adamw(
            trained, operand, d_result, adam.count, learning_rate=config.learning_rate,
            weight_decay=config.weight_decay, **how,
        )  # fmt: skip
        params[path], means[path], squares[path] = (array.reshape(shape) for array in trained)
        squared.append(sums_of_squares.ravel())
    adam = adam._replace(mu=unflatten_dict(means), nu=unflatten_dict(squares))
    after = replace(state, params=unflatten_dict(params), opt_state=cast(Any, (adam, *others)))
    return after, jnp.sqrt(jnp.sum(jnp.concatenate(squared)))


def _flat(tree: Any) -> dict[Path, jax.Array]:
    return cast(dict[Path, jax.Array], flatten_dict(tree))


def _mean_loss(logits: jax.Array, targets: jax.Array, present: jax.Array) -> tuple[jax.Array, Any]:
    sums = summed_losses(logits, targets, present)
    return sums.loss / jnp.maximum(sums.count, 1).astype(jnp.float32), sums
