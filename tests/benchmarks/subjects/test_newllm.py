"""What the benchmark compares with does the same, and its count of the work is right."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from benchmarks.harness import work
from benchmarks.subjects.jax_newllm import loop_forms, orders, training
from benchmarks.subjects.jax_training import write_weights
from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.loss import next_word_loss
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.run import init_params

VOCABULARY = 50


def small(**settings):
    sizes = {"embed_dim": 16, "hidden_dim": 32, "context_dim": 24, "num_layers": 3, "sequence_length": 7, "stride": 7}
    return NewLLMConfig.from_dict({**sizes, "batch_size": 4, **settings})


def gradient(config, params, ids):
    """Mean loss and gradient of the library, without dropout."""

    def mean(params):
        sums, _ = next_word_loss(ContextVectorLM.from_config(config, VOCABULARY))(
            params, ids, jnp.ones(len(ids), bool), None, None
        )
        return sums.loss / sums.count

    return jax.jit(jax.value_and_grad(mean))(params)


def random_ids(config):
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (config.batch_size, config.sequence_length))
    ids[1, 4:] = 0  # a short text
    return ids


def test_the_pytorch_re_creation_has_our_loss_and_gradient(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is an extra: pip install -e '.[benchmarks]'")
    from benchmarks.subjects import torch_newllm, torch_training

    config = small()
    params = init_params(ContextVectorLM.from_config(config, VOCABULARY), 0)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    ids = random_ids(config)
    loss, expected = gradient(config, params, ids)
    write_weights(tmp_path / "weights.npz", params)
    weights = torch_training.read_weights(str(tmp_path / "weights.npz"), torch_newllm.kernel_is_transposed)
    step = torch_newllm.cell
    on_device = torch.from_numpy(ids).to(torch_training.device())
    total, count = torch_newllm.newllm_loss(weights, config.num_layers, 0.0, step, on_device)
    (total / count).backward()
    assert int(count) == np.count_nonzero(ids[:, 1:])
    np.testing.assert_allclose((total / count).item(), loss, rtol=1e-5)
    for name, value in flatten_dict(expected, sep="/").items():
        found = weights[name].grad.cpu().numpy()
        found = found.T if torch_newllm.kernel_is_transposed(name) else found
        np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-6, err_msg=name)


def test_counted_work_is_what_xla_counts(monkeypatch):
    # XLA counts the body of a loop once, so the loop over time is unrolled for it.
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *given, **named: scan(*given, **{**named, "unroll": True}))
    config = small(embed_dim=128, hidden_dim=256, context_dim=128, batch_size=32)
    params = jax.eval_shape(lambda: init_params(ContextVectorLM.from_config(config, VOCABULARY), 0))
    compiled = jax.jit(partial(gradient, config)).lower(params, random_ids(config)).compile()
    found = compiled.cost_analysis()["flops"]
    counted = work.newllm_update(config, VOCABULARY).flops
    assert counted < found < 1.04 * counted  # XLA counts additions and the like too


def test_a_form_of_the_time_loop_is_a_program_of_its_own():
    config = small()
    forms = loop_forms(config)
    ids = random_ids(config)
    programs = []
    for form in (None, *forms):
        trained = training(config, VOCABULARY, ids, 1, form=form)
        arguments = trained.state, trained.totals, trained.data, trained.order, 0, 1, trained.key
        programs.append(trained.updates.lower(*arguments).as_text())
    assert programs[0] == programs[1]  # the library's choice comes first
    assert len(set(programs[1:])) == len(forms) > 1


def test_batches_of_the_benchmark_are_full_and_go_through_the_data():
    order = orders(seed=0, examples=10, batch=4, updates=5)
    assert order.shape == (5, 4)
    assert sorted(order.ravel()[:10]) == sorted(order.ravel()[10:]) == list(range(10))
