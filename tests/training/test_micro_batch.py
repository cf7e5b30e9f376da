"""An update in parts of a batch: the same as the whole at once but for rounding, dropout masks included."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from newllm_jax.cascade.stage.model import Stage, init_stage
from newllm_jax.cascade.stage.updates import build_stage_training, kernel_obstacle, next_token_loss
from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.finetuning import updates as finetuning_updates
from newllm_jax.finetuning.adaptation import choose_adaptation
from newllm_jax.finetuning.loss import sequence_loss
from newllm_jax.newllm import updates as newllm_updates
from newllm_jax.newllm.loss import next_word_loss
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import init_params
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2, parameter_shapes
from newllm_jax.training.loss_scale import LossScale
from newllm_jax.training.losses import Sums
from newllm_jax.training.step import Totals, init_state, train_step

pytestmark = pytest.mark.quick

MODEL = ContextVectorLM(
    20, embed_dim=8, hidden_dim=16, context_dim=12, num_layers=2, dropout=0.5, variational_dropout=0.2,
    input_dropout=0.2, output_dropout=0.2, weight_dropout=0.2, word_dropout=0.2, form="cpu",
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=30, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
KEY = jax.random.key(7)
PRESENT = jnp.array([True] * 6 + [False])


def new_llm():
    """Texts of different lengths, so that parts have different numbers of targets."""
    ids = np.random.default_rng(1).integers(1, 20, (7, 9))
    ids[1:4, 4:] = 0
    return next_word_loss(MODEL), init_params(MODEL, 0), jnp.asarray(ids, jnp.uint16)


def cascade():
    draw = np.random.default_rng(2)
    batch = jnp.asarray(draw.standard_normal((7, 16)), jnp.float32), jnp.asarray(draw.integers(0, 30, 7), jnp.int32)
    model = Stage(LLAMA)
    return next_token_loss(model), init_stage(model, 0, 1), batch


def finetune():
    draw = np.random.default_rng(3)
    shapes = parameter_shapes(LLAMA)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape), jnp.float32), shapes)
    return sequence_loss(SmolLM2(LLAMA)), params, jnp.asarray(draw.integers(0, 30, (7, 9)), jnp.int32)


SYSTEMS = {"new-llm": new_llm(), "cascade": cascade(), "finetune": finetune()}
SCALE = LossScale(jnp.float32(2.0**12), jnp.int32(0), jnp.int32(0))
DESCENT = optax.sgd(1.0)  # Adam would magnify the rounding of the smallest gradients


def update(loss, params, batch, micro_batch=None, scale=None):
    """The gradient of an update, read from the step that it makes, and its totals."""
    step = jax.jit(partial(train_step, loss, DESCENT, micro_batch=micro_batch))
    after, totals = step(init_state(params, DESCENT, scale), batch, PRESENT, KEY)
    return jax.tree.map(jnp.subtract, params, after.params), totals


@cache
def whole_batch(system):
    return update(*SYSTEMS[system])


def difference(one, other) -> float:
    """The largest of all gradients, as a share of the largest entry of each."""
    shares = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.maximum(np.abs(a).max(), 1e-3)), one, other)
    return max(jax.tree.leaves(shares))


@pytest.mark.parametrize(
    "system, scale", [("new-llm", SCALE), ("cascade", None)]
)  # a whole run of the third: its own tests
def test_parts_give_the_update_of_the_whole_batch(system, scale):
    whole, totals = whole_batch(system)
    parts, same = update(*SYSTEMS[system], 3, scale)  # one is left for the last part, which two absent ones fill up
    assert difference(whole, parts) < 1e-5
    assert (int(same.sums.count), int(same.sums.hits)) == (int(totals.sums.count), int(totals.sums.hits))
    assert float(same.sums.loss) == pytest.approx(float(totals.sums.loss), rel=1e-5)
    assert float(same.grad_norm) == pytest.approx(float(totals.grad_norm), rel=1e-5)


def test_the_place_of_a_part_matters():
    loss, params, batch = SYSTEMS["new-llm"]

    def forgetful(params, ids, present, key, carry, part):
        return loss(params, ids, present, key, carry, part._replace(first=part.first * 0))

    assert difference(whole_batch("new-llm")[0], update(forgetful, params, batch, 3)[0]) > 1e-2


def test_a_part_as_large_as_the_batch_is_the_batch():
    loss, params, batch = SYSTEMS["new-llm"]
    programs = {
        str(jax.make_jaxpr(partial(train_step, loss, DESCENT, micro_batch=size))(
            init_state(params, DESCENT), batch, PRESENT, KEY
        ))
        for size in (None, 7, 100)
    }  # fmt: skip
    assert len(programs) == 1


def test_a_carry_is_refused():
    def running(params, batch, present, key, carry):
        return Sums(params * carry, jnp.int32(0), jnp.sum(present)), carry

    state = replace(init_state(jnp.ones(()), DESCENT), carry=jnp.ones(()))
    with pytest.raises(InputError, match="micro_batch: this loss hands a carry from batch to batch"):
        train_step(running, DESCENT, state, jnp.arange(7.0), PRESENT, KEY, 3)


@pytest.mark.parametrize("size", [0, -1, 33])
def test_a_micro_batch_is_a_part_of_the_batch(size):
    with pytest.raises(InputError, match=rf"micro_batch: must be .*, not {size}"):
        NewLLMConfig(micro_batch=size)
    assert NewLLMConfig().examples_at_once == CascadeConfig(micro_batch=32).examples_at_once == 32
    assert NewLLMConfig(micro_batch=5).examples_at_once == 5


def built(system, micro_batch):
    """The updates of a configuration of seven examples, with shapes of a state and of data."""
    if system == "new-llm":
        config = NewLLMConfig(batch_size=7, micro_batch=micro_batch)
        training, optimizer = newllm_updates.build_training(config, MODEL, 1)
        params, data = init_params(MODEL, 0), jnp.zeros((7, 200), jnp.uint16)
    elif system == "cascade":
        shared = build_stage_training(Stage(LLAMA), CascadeConfig(batch_size=7, micro_batch=micro_batch))
        training, optimizer = shared.training, shared.optimizer
        params, data = SYSTEMS[system][1:]
    else:
        config = FinetuneConfig(batch_size=7, micro_batch=micro_batch)
        adaptation = choose_adaptation(config, LLAMA)
        training, optimizer = finetuning_updates.build_training(config, adaptation, {}, "fp32")
        params, data = SYSTEMS[system][1:]
    return training.updates, jax.eval_shape(lambda: init_state(params, optimizer)), data


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_setting_reaches_the_updates_of_every_system(system):
    def loops(micro_batch):
        updates, state, data = built(system, micro_batch)
        order = jax.ShapeDtypeStruct((1, 7), jnp.int32)
        return updates.lower(state, Totals.zero(), data, order, 0, 1, KEY).as_text().count("stablehlo.while")

    assert loops(3) == loops(None) + 1
    assert loops(7) == loops(None)


def test_the_kernels_of_a_stage_leave_parts_to_the_plain_update():
    stage = Stage(LlamaConfig(), "tf32")
    assert "micro_batch" in kernel_obstacle(stage, 32, 16)
    assert "micro_batch" not in kernel_obstacle(stage, 32, 32) + kernel_obstacle(stage, 32)
