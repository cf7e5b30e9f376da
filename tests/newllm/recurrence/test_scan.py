"""The recurrence against a step-by-step float64 re-computation, and its own backward pass against JAX's."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.recurrence.cell import CellParams, keep
from newllm_jax.newllm.recurrence.scan import fusible, loops_for, scan, scan_plain

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def strict_promotion():
    """No dtype is widened unless the code says so."""
    with jax.numpy_dtype_promotion("strict"):
        yield


TIME, HIDDEN, CONTEXT, LAYERS = 9, 8, 6, 4
FORMS = {"rows": scan, "columns": partial(scan, loops="columns")}  # `fused` has its own tests
HIGHEST = jax.lax.Precision.HIGHEST


def random_params(scale: float = 0.5) -> CellParams:
    draw = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(scale * draw.standard_normal(shape), jnp.float32)

    return CellParams(
        context_in=array(CONTEXT, HIDDEN),
        hidden=tuple((array(HIDDEN, HIDDEN), array(HIDDEN)) for _ in range(LAYERS - 1)),
        gates=(array(HIDDEN, 3 * CONTEXT), array(3 * CONTEXT)),
        norm=(1 + array(CONTEXT), array(CONTEXT)),
    )


@pytest.fixture(params=[1, 3], ids=["one text", "three texts"])  # one cannot be halved
def inputs(request):
    draw = np.random.default_rng(1)
    context = jnp.asarray(draw.standard_normal((request.param, CONTEXT)), jnp.float32)
    tokens = jnp.asarray(draw.standard_normal((TIME, request.param, HIDDEN)), jnp.float32)
    return context, tokens, jnp.array([7, 2**31 + 5], jnp.uint32)


def numpy_scan(params, context, tokens, seeds, dropout):
    """The equations of the report, one token of one text at a time, in float64."""
    shape = TIME, LAYERS, len(context), HIDDEN
    kept = None
    if seeds is not None:
        kept = np.asarray(keep(seeds, dropout, jnp.arange(np.prod(shape), dtype=jnp.uint32))).reshape(shape)
    p = jax.tree.map(lambda array: np.asarray(array, np.float64), params)
    context, tokens = np.asarray(context, np.float64).copy(), np.asarray(tokens, np.float64)
    outputs = np.zeros(tokens.shape)
    for t in range(tokens.shape[0]):
        for b in range(tokens.shape[1]):
            c = context[b]
            h = np.maximum(tokens[t, b] + c @ p.context_in, 0)
            h = h if kept is None else h * kept[t, 0, b] / (1 - dropout)
            for layer, (kernel, bias) in enumerate(p.hidden, start=1):
                h = np.maximum(h @ kernel + bias, 0)
                h = h if kept is None else h * kept[t, layer, b] / (1 - dropout)
            outputs[t, b] = h
            size = len(c)
            forget, update, delta = (
                h @ p.gates[0][:, part * size : (part + 1) * size] + p.gates[1][part * size : (part + 1) * size]
                for part in range(3)
            )
            mixed = c / (1 + np.exp(-forget)) + delta / (1 + np.exp(-update))
            normed = (mixed - mixed.mean()) / np.sqrt(mixed.var() + 1e-5)
            context[b] = np.clip(normed * p.norm[0] + p.norm[1], -10, 10)
    return context, outputs


@pytest.mark.parametrize("form", [*FORMS.values(), scan_plain], ids=[*FORMS, "plain"])
@pytest.mark.parametrize("dropped", [False, True])
def test_equals_the_equations_step_by_step(form, dropped, inputs):
    context, tokens, seeds = inputs
    seeds = seeds if dropped else None
    last, hidden = form(random_params(), context, tokens, seeds, 0.25, HIGHEST)
    expected_last, expected_hidden = numpy_scan(random_params(), context, tokens, seeds, 0.25)
    np.testing.assert_allclose(last, expected_last, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(hidden, expected_hidden, rtol=2e-5, atol=2e-5)


def test_dropout_matters(inputs):
    context, tokens, seeds = inputs
    with_dropout = scan(random_params(), context, tokens, seeds, 0.25, HIGHEST)[1]
    without = scan(random_params(), context, tokens, None, 0.25, HIGHEST)[1]
    assert float(jnp.abs(with_dropout - without).max()) > 0.1


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dropped", [False, True])
def test_own_backward_pass_equals_the_plain_scans(form, dropped, inputs):
    context, tokens, seeds = inputs
    seeds = seeds if dropped else None
    weights_last, weights_hidden = (
        jax.random.normal(jax.random.key(index), shape) for index, shape in enumerate([context.shape, tokens.shape])
    )

    def objective(form, params, context, tokens):
        last, hidden = form(params, context, tokens, seeds, 0.25, HIGHEST)
        return jnp.sum(last * weights_last) + jnp.sum(hidden * weights_hidden)

    own, plain = (
        jax.jit(jax.grad(partial(objective, each), argnums=(0, 1, 2)))(random_params(), context, tokens)
        for each in (form, scan_plain)
    )
    for ours, reference in zip(jax.tree.leaves(own), jax.tree.leaves(plain), strict=True):
        assert float(jnp.abs(reference).max()) > 1e-3
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5 * float(jnp.abs(reference).max()))


def config(**changes):
    return NewLLMConfig().override(changes)


@pytest.mark.usefixtures("triton")
def test_fused_loops_are_for_tensor_cores_and_even_sizes():
    assert fusible(config(), "tf32")
    assert fusible(config(context_dim=1024, num_layers=12, batch_size=512), "bf16")
    assert not fusible(config(), "fp32")
    assert not fusible(config(), "fp16")
    assert not fusible(config(hidden_dim=384), "tf32")
    assert not fusible(config(context_dim=128), "tf32")
    assert not fusible(config(num_layers=1), "tf32")
    assert not fusible(config(sequence_length=8192, batch_size=512), "tf32")


@pytest.mark.parametrize(
    ("platform", "precision", "expected"),
    [("cpu", "fp32", "columns"), ("gpu", "fp32", "rows"), ("gpu", "fp16", "rows")],
)
def test_the_form_of_the_loops_follows_the_device(monkeypatch, platform, precision, expected):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform)])
    assert loops_for(config(), precision) == expected


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")])


@pytest.mark.usefixtures("triton", "a_gpu")
def test_a_gpu_has_fused_loops():
    assert loops_for(config(), "bf16") == "fused"


@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_has_plain_loops_where_jax_lacks_the_kernels_back_end(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    assert not fusible(config(), "bf16")
    assert loops_for(config(), "bf16") == "rows"
