"""The recurrence against a step-by-step float64 re-computation, and its own backward passes against JAX's."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.newllm.recurrence import gpu, reference
from newllm_jax.newllm.recurrence.cell import (
    CellParams,
    CellSpec,
    compute_layer,
    dropout_mask,
    dropout_seeds,
    next_context,
)
from newllm_jax.newllm.recurrence.reference import scan_plain
from newllm_jax.newllm.recurrence.scan import form_for, scan

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def strict_promotion():
    """No dtype is widened unless the code says so."""
    with jax.numpy_dtype_promotion("strict"):
        yield


TIME, HIDDEN, CONTEXT, LAYERS = 9, 8, 6, 4
FORMS = ("plain", "cpu")  # `gpu` has its own tests
SPEC = CellSpec(HIDDEN, CONTEXT, LAYERS, dropout=0.25)


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
        kept = np.asarray(dropout_mask(seeds, dropout, jnp.arange(np.prod(shape), dtype=jnp.uint32))).reshape(shape)
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


@pytest.mark.parametrize("form", [*FORMS, "definition"])
@pytest.mark.parametrize("dropped", [False, True])
def test_equals_the_equations_step_by_step(form, dropped, inputs):
    context, tokens, seeds = inputs
    seeds = seeds if dropped else None
    run = scan_plain if form == "definition" else scan
    last, hidden = run(replace(SPEC, form=form), random_params(), context, tokens, seeds)
    expected_last, expected_hidden = numpy_scan(random_params(), context, tokens, seeds, 0.25)
    np.testing.assert_allclose(last, expected_last, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(hidden, expected_hidden, rtol=2e-5, atol=2e-5)


def test_dropout_matters(inputs):
    context, tokens, seeds = inputs
    with_dropout = scan(SPEC, random_params(), context, tokens, seeds)[1]
    without = scan(SPEC, random_params(), context, tokens, None)[1]
    assert float(jnp.abs(with_dropout - without).max()) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_a_batch_sees_its_rows_of_the_masks(form):
    draw = np.random.default_rng(2)
    context = jnp.asarray(draw.standard_normal((5, CONTEXT)), jnp.float32)
    tokens = jnp.asarray(draw.standard_normal((TIME, 5, HIDDEN)), jnp.float32)
    key, spec = jax.random.key(3), replace(SPEC, form=form)
    whole = scan(spec, random_params(), context, tokens, dropout_seeds(key))
    part = context[2:], tokens[:, 2:]
    for texts, first, same in ((5, 2, True), (5, 1, False), (3, 2, False)):
        seeds = dropout_seeds(key, jnp.int32(first * HIDDEN))
        last, outputs = scan(replace(spec, mask_texts=texts), random_params(), *part, seeds)
        assert np.allclose(last, whole[0][2:], atol=1e-5) == same
        assert np.allclose(outputs, whole[1][:, 2:], atol=1e-5) == same


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropped", [False, True])
def test_own_backward_pass_equals_the_plain_scans(form, dropped, inputs):
    context, tokens, seeds = inputs
    seeds = seeds if dropped else None
    weights_last, weights_hidden = (
        jax.random.normal(jax.random.key(index), shape) for index, shape in enumerate([context.shape, tokens.shape])
    )

    def objective(run, params, context, tokens):
        last, hidden = run(replace(SPEC, form=form), params, context, tokens, seeds)
        return jnp.sum(last * weights_last) + jnp.sum(hidden * weights_hidden)

    own, plain = (
        jax.jit(jax.grad(partial(objective, each), argnums=(0, 1, 2)))(random_params(), context, tokens)
        for each in (scan, scan_plain)
    )
    for ours, expected in zip(jax.tree.leaves(own), jax.tree.leaves(plain), strict=True):
        assert float(jnp.abs(expected).max()) > 1e-3
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def residual_step(spec, params, context, token, time, seeds, layer=None):
    """What `cell.step` would be with residual layers: h = h + layer(h / rms(h))."""
    layer = layer or partial(compute_layer, spec, time, seeds)
    hidden = layer(0, context, params.context_in, token)
    for number, (kernel, bias) in enumerate(params.hidden, 1):
        unit = hidden * jax.lax.rsqrt(jnp.mean(jnp.square(hidden), -1, keepdims=True) + 1e-5)
        hidden = hidden + layer(number, unit, kernel, bias)
    return next_context(context, layer(spec.num_layers, hidden, *params.gates), params.norm), hidden


@pytest.mark.parametrize("dropped", [False, True])
def test_the_plain_form_follows_the_step_whatever_it_computes(dropped, inputs, monkeypatch):
    published = jax.jit(lambda: scan_plain(SPEC, random_params(), *inputs))()
    monkeypatch.setattr(reference, "step", residual_step)
    residual = jax.jit(lambda: scan_plain(SPEC, random_params(), *inputs))()
    assert float(jnp.abs(published[1] - residual[1]).max()) > 0.1
    test_own_backward_pass_equals_the_plain_scans("plain", dropped, inputs)
    found = jax.jit(lambda: scan(SPEC, random_params(), *inputs))()
    for ours, expected in zip(found, residual, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


BASELINE = CellSpec(512, 256, 6, 0.1, "tf32")


@pytest.mark.usefixtures("triton")
def test_the_gpu_kernels_say_what_they_do_not_support():
    assert gpu.supports(BASELINE, 32, 63)
    assert gpu.supports(replace(BASELINE, context_dim=1024, num_layers=12, precision="bf16"), 512, 63)
    for change, batch, steps, reason in (
        ({"precision": "fp32"}, 32, 63, "not in fp32"),
        ({"precision": "fp16"}, 32, 63, "not in fp16"),
        ({"hidden_dim": 384}, 32, 63, "powers of two from 256"),
        ({"context_dim": 128}, 32, 63, "powers of two from 256"),
        ({"num_layers": 1}, 32, 63, "num_layers"),
        ({}, 512, 8191, "smaller micro_batch or sequence_length"),
    ):
        assert reason in gpu.obstacle(replace(BASELINE, **change), batch, steps), change
        assert not gpu.supports(replace(BASELINE, **change), batch, steps)


@pytest.mark.parametrize("gone", ["jax.experimental.pallas.triton", "jax.experimental.pallas"])
def test_a_jax_without_the_back_end_is_an_obstacle_that_is_named(monkeypatch, gone):
    for name in [name for name in sys.modules if name.startswith("jax.experimental.pallas")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, gone, None)
    assert gpu.obstacle(BASELINE, 32, 63) == "this version of JAX has no jax.experimental.pallas.triton"


def pretend(monkeypatch, platform: str) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform)])


@pytest.mark.parametrize(
    ("platform", "precision", "expected"),
    [("cpu", "fp32", "cpu"), ("gpu", "fp32", "plain"), ("gpu", "fp16", "plain")],
)
def test_the_form_of_the_time_loop_follows_the_device(monkeypatch, platform, precision, expected):
    pretend(monkeypatch, platform)
    assert form_for(replace(BASELINE, precision=precision), 32, 63) == expected


@pytest.mark.usefixtures("triton")
def test_a_gpu_with_tensor_cores_runs_the_loop_as_kernels(monkeypatch):
    pretend(monkeypatch, "gpu")
    spec = replace(BASELINE, precision="bf16")
    assert form_for(spec, 32, 63) == "gpu"
    assert form_for(replace(spec, num_layers=2), 32, 63) == "gpu"
    # 6 layers of 512 number their activations in 32 bits up to 699,050 places, the 64 rows that fill up groups counted.
    assert (form_for(spec, 64, 5460), form_for(spec, 64, 5461)) == ("gpu", "plain")
    assert (form_for(spec, 5397, 127), form_for(spec, 5398, 127)) == ("gpu", "plain")


def test_a_gpu_runs_the_plain_loop_where_jax_lacks_the_back_end(monkeypatch):
    pretend(monkeypatch, "gpu")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    assert form_for(replace(BASELINE, precision="bf16"), 32, 63) == "plain"
