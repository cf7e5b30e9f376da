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

from newllm_jax.newllm.dropout import Dropout, Rate
from newllm_jax.newllm.recurrence import cpu, gpu, reference
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec, compute_layer, step
from newllm_jax.newllm.recurrence.reference import scan_plain
from newllm_jax.newllm.recurrence.scan import forms_for, scan

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def strict_promotion():
    """No dtype is widened unless the code says so."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def two_chains(monkeypatch):
    """On a CPU two texts are enough for two chains."""
    monkeypatch.setattr(cpu, "SMALLEST_SPLIT", 1)


TIME, HIDDEN, CONTEXT, LAYERS = 9, 8, 6, 4
FORMS = ("plain", "cpu")  # `gpu` has its own tests
SPEC = CellSpec(HIDDEN, CONTEXT, LAYERS)
RATES = Rate.from_share(0.25), Rate.from_share(0.5)  # of masks by step, and by text


def random_params(scale: float = 0.3) -> CellParams:
    draw = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(scale * draw.standard_normal(shape), jnp.float32)

    return CellParams(
        context_in=array(CONTEXT, HIDDEN),
        hidden=tuple((array(HIDDEN, HIDDEN), array(HIDDEN)) for _ in range(LAYERS - 1)),
        gates=(array(HIDDEN, 3 * CONTEXT), array(3 * CONTEXT)),
        norm=(1 + array(CONTEXT), array(CONTEXT)),
    )


@pytest.fixture
def inputs(request):
    """Of three texts, or of as many as a test asks for: on a CPU one is one chain, more are two."""
    draw, texts = np.random.default_rng(1), getattr(request, "param", 3)
    context = jnp.asarray(draw.standard_normal((texts, CONTEXT)), jnp.float32)
    tokens = jnp.asarray(draw.standard_normal((TIME, texts, HIDDEN)), jnp.float32)
    return context, tokens


def dropout_of(kinds: str, seed: int = 0, first: int = 0) -> CellDropout:
    """Masks by `step`, by `text`, or both."""
    keys = jax.random.split(jax.random.key(seed))
    drawn = [Dropout.from_key(key, rate, first) for key, rate in zip(keys, RATES, strict=True)]
    return CellDropout(*(each if name in kinds else None for name, each in zip(("step", "text"), drawn, strict=True)))


KINDS = ["no", "step", "text", "step and text"]
KINDS_AND_TEXTS = pytest.mark.parametrize(
    "kinds, inputs", [*((kinds, 3) for kinds in KINDS), ("step and text", 1)], indirect=["inputs"]
)
CELLS = ["plain", "residual"]


def numpy_scan(cell, params, context, tokens, dropout):
    """The equations of the cell, one token of one text at a time, in float64."""
    steps, texts, _ = tokens.shape
    shape = steps, LAYERS, texts, HIDDEN
    factors = np.ones(shape)
    for each, places in zip(dropout, (np.arange(np.prod(shape)), np.arange(np.prod(shape[1:]))), strict=True):
        if each:
            kept = np.asarray(each.keeps(jnp.asarray(places, jnp.uint32))).reshape(-1, *shape[1:])
            factors = factors * kept / (1 - (0.25 if each is dropout.step else 0.5))
    p = jax.tree.map(lambda array: np.asarray(array, np.float64), params)
    context, tokens = np.asarray(context, np.float64).copy(), np.asarray(tokens, np.float64)
    outputs = np.zeros(tokens.shape)
    for t in range(steps):
        for b in range(texts):
            c = context[b]
            h = np.maximum(tokens[t, b] + c @ p.context_in, 0) * factors[t, 0, b]
            for layer, (kernel, bias) in enumerate(p.hidden, start=1):
                x = h / np.sqrt(np.mean(h**2) + 1e-5) if cell == "residual" else h
                activations = np.maximum(x @ kernel + bias, 0) * factors[t, layer, b]
                h = h + activations if cell == "residual" else activations
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
@pytest.mark.parametrize("cell", CELLS)
@KINDS_AND_TEXTS
def test_equals_the_equations_step_by_step(form, cell, kinds, inputs):
    dropout = dropout_of(kinds)
    run = scan_plain if form == "definition" else scan
    found = run(replace(SPEC, form=form, cell=cell), random_params(), *inputs, dropout)
    expected = numpy_scan(cell, random_params(), *inputs, dropout)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_every_option_matters(cell, inputs):
    results = [scan(replace(SPEC, cell=cell), random_params(), *inputs, dropout_of(kinds))[1] for kinds in KINDS]
    other = "plain" if cell == "residual" else "residual"
    results.append(scan(replace(SPEC, cell=other), random_params(), *inputs, dropout_of("no"))[1])
    for first in range(len(results)):
        assert all(float(jnp.abs(results[first] - second).max()) > 0.1 for second in results[:first])


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_a_batch_sees_its_rows_of_the_masks(form):
    draw = np.random.default_rng(2)
    context = jnp.asarray(draw.standard_normal((5, CONTEXT)), jnp.float32)
    tokens = jnp.asarray(draw.standard_normal((TIME, 5, HIDDEN)), jnp.float32)
    spec = replace(SPEC, form=form)
    for kinds in KINDS[1:]:
        whole = scan(spec, random_params(), context, tokens, dropout_of(kinds))
        part = context[2:], tokens[:, 2:]
        for texts, first, same in ((5, 2, True), (5, 1, False), (3, 2, False)):
            dropout = dropout_of(kinds, first=first * HIDDEN)
            last, outputs = scan(replace(spec, mask_texts=texts), random_params(), *part, dropout)
            assert np.allclose(last, whole[0][2:], atol=1e-5) == same
            assert np.allclose(outputs, whole[1][:, 2:], atol=1e-5) == same


def test_on_a_cpu_few_activations_are_one_chain(monkeypatch):
    draw, spec = np.random.default_rng(3), replace(SPEC, form="cpu")
    context, tokens = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in ((3, 6), (TIME, 3, HIDDEN)))
    found = {}
    for smallest in (3 * HIDDEN, 3 * HIDDEN + 1):
        monkeypatch.setattr(cpu, "SMALLEST_SPLIT", smallest)
        run = jax.jit(partial(scan, spec, random_params(), context, tokens, dropout_of("step")))
        products = str(jax.make_jaxpr(run)()).count("dot_general")
        found[products] = run()
    assert sorted(found) == [LAYERS + 1, 2 * (LAYERS + 1)]
    for one, two in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
@KINDS_AND_TEXTS
def test_own_backward_pass_equals_the_plain_scans(form, cell, kinds, inputs):
    context, tokens = inputs
    weights_last, weights_hidden = (
        jax.random.normal(jax.random.key(index), shape) for index, shape in enumerate([context.shape, tokens.shape])
    )

    def objective(run, params, context, tokens):
        last, hidden = run(replace(SPEC, form=form, cell=cell), params, context, tokens, dropout_of(kinds))
        return jnp.sum(last * weights_last) + jnp.sum(hidden * weights_hidden)

    own, plain = (
        jax.jit(jax.grad(partial(objective, each), argnums=(0, 1, 2)))(random_params(), context, tokens)
        for each in (scan, scan_plain)
    )
    for ours, expected in zip(jax.tree.leaves(own), jax.tree.leaves(plain), strict=True):
        assert float(jnp.abs(expected).max()) > 1e-3
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def squaring_step(spec, params, context, token, time, dropout, layer=None):
    """Another cell: the gates read the squares of the hidden states."""

    def squared(number, x, kernel, bias):
        return layer(number, jnp.square(x) if number == spec.num_layers else x, kernel, bias)

    layer = layer or partial(compute_layer, spec, time, dropout)
    return step(spec, params, context, token, time, dropout, squared)


@pytest.mark.parametrize("kinds", ["no", "step"])
def test_the_plain_form_follows_the_step_whatever_it_computes(kinds, inputs, monkeypatch):
    def run(form):
        return jax.jit(lambda: form(SPEC, random_params(), *inputs, dropout_of(kinds)))()

    published = run(scan_plain)
    monkeypatch.setattr(reference, "step", squaring_step)
    squared = run(scan_plain)
    assert float(jnp.abs(published[1] - squared[1]).max()) > 0.01
    test_own_backward_pass_equals_the_plain_scans("plain", "residual", kinds, inputs)
    for ours, expected in zip(run(scan), squared, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize(("precision", "half"), [("fp16", jnp.float16), ("bf16", jnp.bfloat16), ("fp32", None)])
def test_kernels_are_rounded_before_the_time_loops(precision, half):
    """A matrix converted at every step took a fifth of an update in fp16 (docs/results, "What a T4 would take")."""
    context, tokens = jnp.zeros((5, CONTEXT)), jnp.zeros((TIME, 5, HIDDEN))
    spec, params = replace(SPEC, precision=precision), random_params()
    kernels = {params.context_in.shape, (HIDDEN, HIDDEN), params.gates[0].shape}

    def objective(params, context, tokens):
        return sum(jnp.sum(x) for x in scan(spec, params, context, tokens, dropout_of("step")))

    def rounds(jaxpr) -> list[tuple[int, ...]]:
        return [
            each.invars[0].aval.shape
            for each in jaxpr.eqns
            if each.primitive.name == "convert_element_type" and each.params["new_dtype"] == half
        ]

    whole = jax.make_jaxpr(jax.grad(objective))(params, context, tokens).jaxpr
    loops = [each.params["jaxpr"].jaxpr for each in whole.eqns if each.primitive.name == "scan"]
    assert len(loops) == 2  # forward and backward
    for loop in loops:
        assert kernels.isdisjoint(rounds(loop))
        assert bool(rounds(loop)) == bool(half)  # of activations and gradients
    assert set(rounds(whole)) >= kernels if half else not rounds(whole)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("bf16_on_a_cpu")
def test_half_precision_rounds_what_the_products_read(cell, inputs):
    dropout, params, (context, tokens) = dropout_of("step"), random_params(), inputs
    spec = replace(SPEC, cell=cell)

    def rounded(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    def body(context, given):
        token, time = given

        def layer(number, x, kernel, bias):
            return compute_layer(spec, time, dropout, number, rounded(x), rounded(kernel), bias)

        return step(spec, params, context, token, time, dropout, layer)

    found = scan(replace(spec, precision="bf16"), params, context, tokens, dropout)
    expected = jax.lax.scan(body, context, (tokens, jnp.arange(len(tokens))))
    strict = scan_plain(spec, params, context, tokens, dropout)
    # The states of a residual cell that are given back are sums of activations as they are stored.
    tolerances = 1e-5, 1e-5 if cell == "plain" else 0.02
    for ours, theirs, other, tolerance in zip(found, expected, strict, tolerances, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
        assert float(jnp.abs(ours - other).max()) > 1e-3


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("bf16_on_a_cpu")
def test_half_precision_has_the_gradients_of_float32_but_for_rounding(cell, inputs):
    def gradients(precision):
        def objective(params, context, tokens):
            last, outputs = scan(
                replace(SPEC, cell=cell, precision=precision), params, context, tokens, dropout_of("step")
            )
            return jnp.sum(jnp.sin(last)) + jnp.sum(jnp.cos(outputs))

        return jax.jit(jax.grad(objective, (0, 1, 2)))(random_params(), *inputs)

    for half, whole in zip(*map(jax.tree.leaves, (gradients("bf16"), gradients("fp32"))), strict=True):
        assert half.dtype == whole.dtype == jnp.float32
        assert 1e-5 < float(jnp.linalg.norm(half - whole) / jnp.linalg.norm(whole)) < 0.05


def test_activations_are_stored_in_the_type_of_the_products(inputs):
    for precision, kind in (("fp16", jnp.float16), ("bf16", jnp.bfloat16), ("fp32", jnp.float32)):
        run = partial(reference.forward, replace(SPEC, precision=precision), random_params())
        _, stored = jax.eval_shape(run, *inputs, dropout_of("step"))
        assert [x.dtype for x in stored.layers] == [kind] * (LAYERS - 1) + [jnp.float32] * 2


BASELINE = CellSpec(512, 256, 6, precision="tf32")


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
    assert forms_for(replace(BASELINE, precision=precision), 32, 63)[0] == expected


@pytest.mark.usefixtures("triton")
def test_a_gpu_with_tensor_cores_runs_the_loop_as_kernels(monkeypatch):
    pretend(monkeypatch, "gpu")
    spec = replace(BASELINE, precision="bf16")
    assert forms_for(spec, 32, 63)[0] == "gpu"
    assert forms_for(replace(spec, num_layers=2), 32, 63)[0] == "gpu"
    # 6 layers of 512 number their activations in 32 bits up to 699,050 places, the 64 rows that fill up groups counted.
    assert (forms_for(spec, 64, 5460)[0], forms_for(spec, 64, 5461)[0]) == ("gpu", "plain")
    assert (forms_for(spec, 5397, 127)[0], forms_for(spec, 5398, 127)[0]) == ("gpu", "plain")


def test_a_gpu_runs_the_plain_loop_where_jax_lacks_the_back_end(monkeypatch):
    pretend(monkeypatch, "gpu")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    assert forms_for(replace(BASELINE, precision="bf16"), 32, 63)[0] == "plain"
