"""A stage's updates through the GPU kernels, beside the plain ones in strict float32, in the widths of SmolLM2-135M.

Errors are relative: the norm of the difference over the norm of the reference, the largest of all arrays. What rounding
alone makes of them was computed on a CPU, with the operands of the plain update's products truncated to tf32, as tensor
cores may do; what a mistake makes of them, by counting the absent tokens of the last of 16:

                            1 update             3 updates
    mean of the gradient    2.6e-3   (5.7e-1)    3.8e-3   (3.9e-1)
    and of its square       5.1e-3   (6.4e-1)    5.8e-3   (4.7e-1)
    parameters' moves       8.1e-2   (9.0e-1)    3.5e-2   (1.4e-1)

Adam's first steps hardly depend on the size of a gradient, so the few weights whose gradient is smaller than its
rounding error may move the wrong way, which makes the error of the moves larger than that of the moments.
"""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

UPDATES, ABSENT = 3, 5  # tokens that the last batch lacks
MEAN, SQUARE, MOVE = 1e-2, 2e-2, {1: 0.15, UPDATES: 0.06}  # the largest errors allowed


@cache
def setting():
    """A stage in tf32 and the same in float32, their configuration and optimiser."""
    from newllm_jax.cascade.stage.model import Stage
    from newllm_jax.config import CascadeConfig
    from newllm_jax.smollm.llama_config import LlamaConfig
    from newllm_jax.training.optimizer import adamw

    config = CascadeConfig(learning_rate=1e-3, weight_decay=0.1)
    stage = Stage(LlamaConfig(vocab_size=1024, num_layers=2), precision="tf32")
    return stage, stage.clone(precision="fp32"), config, adamw(config.learning_rate, config.weight_decay)


@cache
def compiled(form):
    """The compiled updates of a form."""
    from newllm_jax.cascade.stage.fused_step import stage_step
    from newllm_jax.cascade.stage.updates import next_token_loss
    from newllm_jax.training.step import make_updates, train_step

    stage, strict, config, optimizer = setting()
    if form == "kernels":
        return make_updates(partial(stage_step, stage, config, optimizer))
    return make_updates(partial(train_step, next_token_loss(strict), optimizer))


@cache
def start():
    """Parameters before the first update, in the memory of the host: updates reuse that of their state."""
    from newllm_jax.cascade.stage.model import init_stage

    return jax.device_get(init_stage(setting()[1], 0, 1))


@cache
def after(form, batch, updates, absent=ABSENT):
    """State and totals after the first updates; some tokens of the last batch are absent."""
    from newllm_jax.training.step import Totals, init_state

    draw, tokens = np.random.default_rng(0), batch * UPDATES
    hidden = jnp.asarray(draw.standard_normal((tokens, 576), np.float32))
    targets = jnp.asarray(draw.integers(0, 1024, tokens), jnp.int32)
    order = np.arange(tokens, dtype=np.int32).reshape(UPDATES, batch)
    order[updates - 1, batch - absent :] = -1
    state = init_state(jax.tree.map(jnp.asarray, start()), setting()[3])
    key = jax.random.key(0)
    return jax.device_get(
        compiled(form)(state, Totals.zero(), (hidden, targets), jnp.asarray(order), 0, updates, key)
    )  # fmt: skip


def largest_error(ours, reference):
    """Over the arrays of two trees, where the reference is not 0 everywhere."""
    errors = []
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(reference), strict=True
    ):  # fmt: skip
        if np.any(other):
            errors.append(float(np.linalg.norm(one - other) / np.linalg.norm(other)))
        else:
            assert not np.any(one), jax.tree_util.keystr(path)
    assert len(errors) > 5
    return max(errors)


def compare(ours, reference):
    """The largest error of moments (mean and square of the gradient) and of the parameters' moves, with its bound."""
    adam, other = ours[0].opt_state[0], reference[0].opt_state[0]
    moves = (jax.tree.map(np.subtract, state.params, start()) for state, _ in (ours, reference))
    return [
        (largest_error(adam.mu, other.mu), MEAN),
        (largest_error(adam.nu, other.nu), SQUARE),
        (largest_error(*moves), MOVE[int(other.count)]),
    ]


@pytest.mark.parametrize("updates", [1, UPDATES])
@pytest.mark.parametrize("batch", [16, 32, 64])
def test_updates_equal_the_plain_ones(batch, updates):
    ours, reference = (after(form, batch, updates) for form in ("kernels", "plain"))
    for found, allowed in compare(ours, reference):
        assert found < allowed
    assert int(ours[0].opt_state[0].count) == updates
    totals, expected = ours[1], reference[1]
    assert int(totals.sums.count) == int(expected.sums.count) == batch * updates - ABSENT
    assert float(totals.sums.loss) == pytest.approx(float(expected.sums.loss), rel=1e-3)
    assert float(totals.grad_norm) == pytest.approx(float(expected.grad_norm), rel=5e-3)


@pytest.mark.parametrize("updates", [1, UPDATES])
def test_a_mistake_would_be_seen(updates):
    """Updates that counted the absent tokens would be further off than the bounds allow."""
    reference, wrong = (after("plain", 16, updates, absent) for absent in (ABSENT, 0))
    for found, allowed in compare(wrong, reference):
        assert found > 2 * allowed


def test_queries_and_keys_only_decay():
    _, _, config, _ = setting()
    attention = after("kernels", 32, UPDATES)[0].params["backbone"]["blocks"]["attention"]
    before = start()["backbone"]["blocks"]["attention"]
    factor = (1 - config.learning_rate * config.weight_decay) ** UPDATES
    assert factor < 1 - 1e-4
    for name in ("q_proj", "k_proj"):
        np.testing.assert_allclose(attention[name]["kernel"], before[name]["kernel"] * factor, rtol=1e-6)
