"""A stage: its size, its initial weights, one token at a time, and AdamW as PyTorch has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.cascade.stage.updates import next_token_loss
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2, parameter_shapes
from newllm_jax.training.optimizer import adamw
from newllm_jax.training.step import count_parameters, init_state, train_step

pytestmark = pytest.mark.quick

SMALL = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=4
)
STAGE = Stage(stage_config(SMALL, 2))


@pytest.fixture(scope="module")
def params():
    return init_stage(STAGE, 0, 1)


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return jnp.asarray(draw.standard_normal((6, 16), np.float32)), jnp.asarray(draw.integers(0, 40, 6), jnp.int32)


@pytest.fixture(scope="module")
def gradient(batch):
    """The gradient of the mean loss of the batch."""
    loss = next_token_loss(STAGE)
    return jax.jit(jax.grad(lambda params: loss(params, batch, jnp.ones(6, bool), None, None)[0].loss / 6))


def test_published_sizes():
    base = LlamaConfig()
    stage = Stage(stage_config(base, 8))
    size = count_parameters(jax.eval_shape(lambda: init_stage(stage, 0, 1)))
    assert size == 56_632_896 == 8 * 3_540_096 + 28_311_552 + 576
    totals = [count_parameters(parameter_shapes(base)) + number * size for number in range(6)]
    assert totals == [134_515_008, 191_147_904, 247_780_800, 304_413_696, 361_046_592, 417_679_488]
    assert [base.num_layers + 8 * number for number in range(1, 6)] == [38, 46, 54, 62, 70]


def test_initial_weights(params):
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for name, leaf in flat.items():
        if "scale" in name:
            assert (leaf == 1).all(), name
        else:
            assert abs(float(leaf.std()) - 0.02) < 0.004, name
    assert not (params["embed"]["embedding"] == init_stage(STAGE, 0, 2)["embed"]["embedding"]).any()
    assert not (params["embed"]["embedding"] == init_stage(STAGE, 1, 1)["embed"]["embedding"]).any()


def test_it_is_a_llama_that_reads_one_token_at_a_time(params, batch):
    hidden, _ = batch
    last, logits = STAGE.apply({"params": params}, hidden)
    llama = SmolLM2(STAGE.config)
    alone = jax.jit(lambda x: llama.apply({"params": params}, x, method="from_hidden"))
    for index in range(len(hidden)):
        states = alone(hidden[index][None, None])
        np.testing.assert_allclose(states.last[0, 0], last[index], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(logits, last @ params["embed"]["embedding"].T, rtol=1e-5, atol=1e-6)
    changed, _ = STAGE.apply({"params": params}, hidden.at[0].add(1.0))
    assert (changed[1:] == last[1:]).all()
    assert (changed[0] != last[0]).any()


def test_attention_to_one_key_gives_queries_and_keys_no_gradient(params, gradient):
    attention = gradient(params)["backbone"]["blocks"]["attention"]
    for name in ("q_proj", "k_proj"):
        assert (attention[name]["kernel"] == 0).all()
    for name in ("v_proj", "o_proj"):
        assert (attention[name]["kernel"] != 0).any()


def test_the_loss_counts_those_present(params, batch):
    loss, (hidden, targets) = next_token_loss(STAGE), batch
    _, logits = STAGE.apply({"params": params}, hidden)
    per_token = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    sums, _ = loss(params, batch, jnp.arange(6) < 4, None, None)
    assert int(sums.count) == 4
    assert float(sums.loss) == pytest.approx(float(per_token[:4].sum()), rel=1e-6)
    assert int(sums.hits) == int((jnp.argmax(logits, -1) == targets)[:4].sum())


def test_adamw_against_its_equations(params, batch, gradient):
    """Decay of all parameters, then Adam with bias correction, as PyTorch does them."""
    rate, decay, loss = 1e-2, 0.1, next_token_loss(STAGE)
    optimizer, present = adamw(rate, decay), jnp.ones(6, bool)
    state = init_state(params, optimizer)
    update = jax.jit(lambda state: train_step(loss, optimizer, state, batch, present, jax.random.key(0)))
    ours, m, v = jax.tree.map(np.asarray, (params, *(jax.tree.map(jnp.zeros_like, params) for _ in range(2))))
    for step in range(1, 4):
        grads = gradient(jax.tree.map(jnp.asarray, ours))
        m = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * np.asarray(g), m, grads)
        v = jax.tree.map(lambda a, g: 0.999 * a + 0.001 * np.asarray(g) ** 2, v, grads)
        ours = jax.tree.map(
            lambda p, a, b, step=step: p * (1 - rate * decay)
            - rate * (a / (1 - 0.9**step)) / (np.sqrt(b / (1 - 0.999**step)) + 1e-8),
            ours, m, v,
        )  # fmt: skip
        state, _ = update(state)
    queries = state.params["backbone"]["blocks"]["attention"]["q_proj"]["kernel"]
    first = params["backbone"]["blocks"]["attention"]["q_proj"]["kernel"]
    np.testing.assert_allclose(queries, first * (1 - rate * decay) ** 3, rtol=1e-5)
    norm = params["backbone"]["norm"]["scale"]
    assert (state.params["backbone"]["norm"]["scale"] < norm + 0.03).all()
    for left, right in zip(jax.tree.leaves(state.params), jax.tree.leaves(ours), strict=True):
        # Where a gradient is all rounding, Adam turns it into a whole step: those few may differ.
        close = np.isclose(left, right, rtol=1e-3, atol=1e-4)
        assert close.mean() > 0.99
