"""The stage that the benchmark compares with is ours, and its count of the work is right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from benchmarks.harness import work
from benchmarks.subjects.jax_training import write_weights
from newllm_jax.cascade.stage.model import Stage, init_stage
from newllm_jax.cascade.stage.updates import next_token_loss
from newllm_jax.smollm.llama_config import LlamaConfig

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
LLAMA = LlamaConfig(**SIZES, head_dim=4, vocab_size=100)
BATCH = 16


def gradient(params, hidden, targets):
    """Mean loss and gradient of the library."""

    def mean(params):
        present = jnp.ones(len(targets), bool)
        return next_token_loss(Stage(LLAMA))(params, (hidden, targets), present, None, None)[0].loss / len(targets)

    return jax.jit(jax.value_and_grad(mean))(params)


def random_tokens():
    draw = np.random.default_rng(0)
    return draw.standard_normal((BATCH, LLAMA.hidden_size)).astype(np.float32), draw.integers(0, 100, BATCH)


def test_the_pytorch_stage_has_our_loss_and_gradient(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is an extra: pip install -e '.[benchmarks]'")
    from benchmarks.subjects import torch_cascade, torch_training

    params = init_stage(Stage(LLAMA), 0, 1)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    hidden, targets = random_tokens()
    loss, expected = gradient(params, hidden, targets)
    write_weights(tmp_path / "weights.npz", params)
    weights = torch_cascade.read_stage_weights(str(tmp_path / "weights.npz"))
    batch = [torch.from_numpy(array).to(torch_training.device()) for array in (hidden, targets)]
    total, count = torch_cascade.stage_loss(weights, LLAMA, *batch)
    (total / count).backward()
    np.testing.assert_allclose((total / count).item(), loss, rtol=1e-5)
    for name, value in flatten_dict(expected, sep="/").items():
        for layer in range(LLAMA.num_layers) if name.startswith(torch_cascade.BLOCKS) else [None]:
            weight, ours = (
                weights[name if layer is None else f"{name}/{layer}"],
                value if layer is None else value[layer],
            )
            if torch_cascade.is_query_or_key(name):
                assert weight.grad is None
                np.testing.assert_allclose(ours, 0, atol=1e-6)
                continue
            found = weight.grad.cpu().numpy()
            found = found.T if name.endswith("kernel") else found
            np.testing.assert_allclose(found, ours, rtol=1e-3, atol=1e-6, err_msg=name)


def test_counted_work_is_what_xla_counts(monkeypatch):
    # XLA counts the body of a loop once, so the loop over layers is unrolled for it.
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *given, **named: scan(*given, **{**named, "unroll": True}))
    shapes = jax.eval_shape(lambda: init_stage.__wrapped__(Stage(LLAMA), 0, 1))
    found = jax.jit(gradient).lower(shapes, *random_tokens()).compile().cost_analysis()["flops"]
    counted = work.stage_update(LLAMA, BATCH).flops
    query_key, _ = work.block_kernels(LLAMA)
    most = counted + 3 * 2 * BATCH * LLAMA.num_layers * query_key  # ours may compute what it could leave out
    assert counted < found < 1.05 * most
