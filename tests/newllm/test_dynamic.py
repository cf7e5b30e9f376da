"""Dynamic evaluation: its equation step by step, and what it gains on a text unlike the one that was trained on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax import systems
from newllm_jax.config import NewLLMConfig, load_config
from newllm_jax.errors import InputError
from newllm_jax.newllm import dynamic
from newllm_jax.newllm.dynamic import EPSILON, Adaptation, gradient_sizes, make_reader, read_text
from newllm_jax.newllm.experiment import train_newllm
from newllm_jax.newllm.loss import initial_carry, next_word_loss
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import init_params
from newllm_jax.training.loop import evaluate
from newllm_jax.training.split import Split
from newllm_jax.training.step import make_evaluation

pytestmark = pytest.mark.quick

CONFIG = NewLLMConfig(text="stream", context_dim=12)
MODEL = ContextVectorLM(20, 8, 16, 12, 2, initialization="he", dropout=0.0)
LOSS, PARAMS = next_word_loss(MODEL), init_params(MODEL, 0)
IDS = np.random.default_rng(0).integers(3, 20, 32).astype(np.uint16)


@pytest.fixture(scope="module")
def sizes():
    return gradient_sizes(LOSS, PARAMS, np.random.default_rng(1).integers(3, 20, 2000).astype(np.uint16), CONFIG)


@jax.jit
def gradient_of_mean(params, segment, carry):
    """Of the mean loss of a segment; the sums of losses, and the carry after it."""

    def mean(params):
        sums, after = LOSS(params, segment, jnp.ones(len(segment), bool), None, carry)
        return sums.loss / sums.count, (sums, after)

    return jax.grad(mean, has_aux=True)(params)


def read(sizes, ids, *members):
    rates, decays = np.array(members, np.float32).T
    return read_text(make_reader(LOSS), PARAMS, sizes, ids, Adaptation(rates, decays), CONFIG)


def test_follows_its_equation(sizes, monkeypatch):
    """Segment by segment, the members in the same call."""
    monkeypatch.setattr(dynamic, "AT_ONCE", 4)
    members = [(0.002, 0.0), (0.002, 0.5), (0.01, 0.0)]
    found = read(sizes, IDS, *members)
    mean = np.mean(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(sizes)]))
    for (rate, decay), metrics in zip(members, found, strict=True):
        params, carry, total, count = PARAMS, initial_carry(CONFIG, 1), 0.0, 0
        for start in range(0, 31, 5):
            segment = jnp.asarray(IDS[start : start + 6])[None]
            segment = jnp.pad(segment, [(0, 0), (0, 6 - segment.shape[1])])
            gradient, (sums, carry) = gradient_of_mean(params, segment, carry)
            total, count = total + float(sums.loss), count + int(sums.count)
            params = jax.tree.map(
                lambda p, p0, g, r, rate=rate, decay=decay: (
                    p - rate * g / (r + EPSILON) + np.minimum(decay * r / mean, 1) * (p0 - p)
                ),
                params, PARAMS, gradient, sizes,
            )  # fmt: skip
        assert count == len(IDS) - 1
        assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert len({metrics["loss"] for metrics in found}) == 3


def test_without_learning_it_is_the_static_evaluation(sizes):
    (found,) = read(sizes, IDS, (0.0, 0.5))
    piece = Split.from_arrays(IDS[None], 1, initial_carry(CONFIG, 1))
    static = evaluate(make_evaluation(LOSS), PARAMS, piece, 1)
    assert found == pytest.approx(static, rel=1e-4)


def test_no_loss_is_measured_after_its_words_were_seen(sizes):
    """A text of one segment: whatever is learnt from it comes too late."""
    still, learning = read(sizes, IDS[:6], (0.0, 0.0), (0.5, 0.0))
    assert still == learning


def test_a_text_that_repeats_itself_is_learnt(sizes):
    still, learning = read(sizes, np.tile(IDS[:10], 20), (0.0, 0.0), (0.003, 0.0))
    assert learning["loss"] < still["loss"] - 0.2


def test_sizes_are_root_mean_squares_over_segments(sizes):
    ids = np.random.default_rng(1).integers(3, 20, 2000).astype(np.uint16)
    rows = np.pad(ids, (0, 100))[np.arange(64)[:, None] * 32 + np.arange(33)]  # 32 targets a row: 6 segments and a rest
    rows = np.where(np.arange(64)[:, None] * 32 + np.arange(33) < 2000, rows, 0)
    rows, carry, total = np.pad(rows, ((0, 0), (0, 3))), initial_carry(CONFIG, 64), 0.0
    for start in range(0, 35, 5):
        gradient, (_, carry) = gradient_of_mean(PARAMS, jnp.asarray(rows[:, start : start + 6]), carry)
        total = total + np.square(gradient["logits"]["bias"])
    np.testing.assert_allclose(sizes["logits"]["bias"], np.sqrt(total / 7), rtol=1e-4)


def test_a_run_gives_its_figures_beside_the_static_ones(small, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic, "CHOICE_SEGMENTS", 20)
    config = load_config("baseline", small | {"text": "stream", "batch_size": 4, "num_epochs": 1})
    run = train_newllm(config, run_root=tmp_path, narrate=lambda _: None).run_dir
    found = systems.evaluate(run, dynamic=True)
    assert systems.evaluate(run) == {name: found[name] for name in ("system", "validation", "test")}
    assert found["dynamic"]["chosen_on_targets"] == 100
    assert found["dynamic"]["rate"] in map(np.float32, dynamic.RATES)
    for split in ("validation", "test"):
        assert 0 < abs(found["dynamic"][split]["loss"] - found[split]["loss"]) < 0.5


def test_windows_are_refused(small_run):
    with pytest.raises(InputError, match="text: must be stream, in which each word follows the one before"):
        systems.evaluate(small_run, dynamic=True)
