"""The time loop as GPU kernels, with full groups and clusters of thread blocks, beside the plain loop in float32.

Errors are relative: the norm of the difference over the norm of the reference. What rounding alone makes of them was
computed on a CPU, with the operands of the plain loop's products rounded (bf16) or truncated (tf32, as tensor cores
may do), for the inputs below:

    precision   results        gradients of parameters   gradients of context and tokens
    tf32        up to 2.1e-3   up to 2.2e-2              up to 2.1e-1
    bf16        up to 3.3e-3   up to 2.5e-2              up to 2.2e-1

Gradients have larger errors than results, because a pre-activation near 0 can change its sign by rounding, which
switches the whole gradient of a unit on or off. In the gradients of the parameters those average out over texts and
steps, as the cotangents are the same for all of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

TIME = 12
CELLS = ["plain", "residual"]
SHAPES = [
    (33, 256, 256, 2),
    (32, 512, 256, 3),
    (300, 512, 256, 6),
    (200, 256, 512, 2),
    (40, 1024, 1024, 2),
]  # batch, H, C, L
CLUSTER_SHAPES = [SHAPES[0], (300, 512, 512, 6), (512, 512, 512, 3)]
LOOPS = [(form, precision, cell) for form, precision in (("gpu", "tf32"), ("gpu", "bf16")) for cell in CELLS]
LOOPS.append(("cluster", "bf16", "plain"))
RESULTS, PARAMETERS, ROWS = {"tf32": 4e-3, "bf16": 8e-3}, 5e-2, 0.3  # the largest errors allowed
RATES = {"step": 0.1, "text": 0.2}


@cache
def inputs(batch, hidden, context, layers):
    """Parameters, context and tokens; every layer passes signal on, and about half of its units are active."""
    from newllm_jax.newllm.recurrence.cell import CellParams

    draw = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * draw.standard_normal(shape), jnp.float32)

    def bias():
        return jnp.asarray(0.5 * draw.choice([-1, 1], hidden), jnp.float32) + normal(hidden, scale=0.1)

    params = CellParams(
        context_in=normal(context, hidden, scale=context**-0.5),
        hidden=tuple((normal(hidden, hidden, scale=hidden**-0.5), bias()) for _ in range(layers - 1)),
        gates=(normal(hidden, 3 * context, scale=hidden**-0.5), normal(3 * context, scale=0.3)),
        norm=(1 + normal(context, scale=0.2), normal(context, scale=0.2)),
    )
    tokens = jnp.asarray(draw.choice([-1, 1], (TIME, batch, hidden)), jnp.float32)
    return params, normal(batch, context), tokens + normal(TIME, batch, hidden, scale=0.3)


def dropout_of(kinds, first=0):
    """Masks of these kinds, of a part of a batch that begins with this place."""
    from newllm_jax.newllm.dropout import Dropout, Rate
    from newllm_jax.newllm.recurrence.cell import CellDropout

    keys = dict(zip(RATES, jax.random.split(jax.random.key(3)), strict=True))
    return CellDropout(**{kind: Dropout.from_key(keys[kind], Rate.from_share(RATES[kind]), first) for kind in kinds})


def skip_where_absent(spec):
    """Clusters of thread blocks need newer GPUs, and a newer JAX, than the other tests of this file."""
    from newllm_jax.newllm.recurrence import cluster

    if spec.form == "cluster" and (reason := cluster.obstacle(spec, 512, TIME)):
        pytest.skip(reason)


def loop(form, precision, shape, cell="plain", kinds=()):
    """The compiled loop: (params, context, tokens) -> its results and all gradients of a weighted sum of those."""
    from newllm_jax.newllm.recurrence.cell import CellSpec
    from newllm_jax.newllm.recurrence.scan import scan

    _, hidden, context, layers = shape
    spec, dropout = CellSpec(hidden, context, layers, cell, precision, form), dropout_of(kinds)
    skip_where_absent(spec)
    # bf16 numbers, so that no form has to round them; the same for all texts and steps
    to_last, to_outputs = (
        jax.random.normal(jax.random.key(index), (width,), jnp.bfloat16).astype(jnp.float32)
        for index, width in enumerate((context, hidden))
    )

    def weighted_sum(params, context, tokens):
        last, outputs = scan(spec, params, context, tokens, dropout)
        outputs = outputs.astype(jnp.float32)
        return jnp.sum(last * to_last) + jnp.sum(outputs * to_outputs), (last, outputs)

    def run(*arguments):
        (_, results), gradients = jax.value_and_grad(weighted_sum, (0, 1, 2), has_aux=True)(*arguments)
        return results, gradients

    return jax.jit(run)


def error(ours, reference):
    return float(jnp.linalg.norm((ours - reference).ravel()) / jnp.linalg.norm(reference.ravel()))


def errors(ours, reference):
    """Of results, of the gradients of parameters, and of those of context and tokens: an error for each array."""
    (results, (params, *rows)), (other, (other_params, *other_rows)) = ours, reference
    return [
        jax.tree.leaves(jax.tree.map(error, one, two))
        for one, two in ((results, other), (params, other_params), (rows, other_rows))
    ]


@cache
def strict(shape, cell, kinds):
    """The reference, and its errors against that of a model whose second layer has another bias."""
    run, (params, context, tokens) = loop("plain", "fp32", shape, cell, kinds), inputs(*shape)
    (kernel, bias), *others = params.hidden
    changed = params._replace(hidden=((kernel, bias + 1.5), *others))
    reference = run(params, context, tokens)
    return reference, errors(run(changed, context, tokens), reference)


@pytest.mark.parametrize(
    ("form", "precision", "cell", "shape"),
    [(*each, shape) for each in LOOPS for shape in (CLUSTER_SHAPES if each[0] == "cluster" else SHAPES)],
    ids=lambda value: "batch {} H {} C {} L {}".format(*value) if isinstance(value, tuple) else value,
)
@pytest.mark.parametrize("kinds", [(), ("step",), ("step", "text")], ids="-".join)
def test_results_and_gradients_equal_the_plain_loops(kinds, form, precision, cell, shape):
    reference, of_change = strict(shape, cell, kinds)
    ours = errors(loop(form, precision, shape, cell, kinds)(*inputs(*shape)), reference)
    for found, wrong, allowed in zip(ours, of_change, (RESULTS[precision], PARAMETERS, ROWS), strict=True):
        assert max(found) < allowed
        assert max(wrong) > 2 * allowed  # such a mistake would be seen


def test_results_have_the_rounding_of_their_precision():
    """The loops of tf32 and bf16 are different programs, and neither of them is in float32."""
    reference, _ = strict(SHAPES[0], "plain", ())
    tf32, bf16 = (
        max(errors(loop("gpu", precision, SHAPES[0])(*inputs(*SHAPES[0])), reference)[0])
        for precision in ("tf32", "bf16")
    )
    assert 1e-5 < tf32 < bf16


@pytest.mark.parametrize(("form", "precision", "cell"), LOOPS)
def test_a_run_gives_the_same_bits_every_time(form, precision, cell):
    """Blocks that read before others have written would give different numbers from run to run.

    The gradients of parameters are sums that XLA forms outside the kernels, in an order that may differ.
    """
    shape = CLUSTER_SHAPES[1] if form == "cluster" else SHAPES[1]
    run, arguments = loop(form, precision, shape, cell, ("step",)), inputs(*shape)

    def bits():
        results, (_, *rows) = run(*arguments)
        return [np.asarray(array) for array in (*results, *rows)]

    first = bits()
    for _ in range(20):
        for one, other in zip(bits(), first, strict=True):
            np.testing.assert_array_equal(one, other)
    params, context, tokens = arguments
    moved, _ = run(params, context.at[-1, -1].add(0.1), tokens)
    assert np.any(np.asarray(moved[0])[-1] != first[0][-1])  # the last text's, one of those that fill a group partly
    np.testing.assert_array_equal(np.asarray(moved[0])[:-1], first[0][:-1])


@pytest.mark.parametrize(("form", "precision", "cell"), LOOPS)
def test_members_of_a_vmap_have_the_numbers_that_each_has_alone(form, precision, cell):
    """Two members of 128 texts, so that a group has other rows than in a launch of one."""
    shape = (128, 256, 256, 2)
    run, one = loop(form, precision, shape, cell, ("step", "text")), inputs(*shape)
    other = jax.tree.map(lambda leaf: leaf * 0.5, one)
    found = jax.jit(jax.vmap(run))(*jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other))
    for number, member in enumerate((one, other)):
        ours = jax.tree.map(lambda leaf, number=number: leaf[number].astype(jnp.float32), found)
        alone, wrong = run(*member), run(*(other if number == 0 else one))
        limits = RESULTS[precision], PARAMETERS, ROWS
        for same, different, allowed in zip(errors(ours, alone), errors(ours, wrong), limits, strict=True):
            assert max(same) < allowed < max(different)


@pytest.mark.parametrize(("form", "precision"), [("gpu", "tf32"), ("gpu", "bf16"), ("cluster", "bf16")])
def test_a_part_of_a_batch_sees_its_rows_of_the_masks(form, precision):
    from newllm_jax.newllm.recurrence.cell import CellSpec
    from newllm_jax.newllm.recurrence.scan import scan

    batch, hidden, width, layers = SHAPES[0]
    params, context, tokens = inputs(*SHAPES[0])
    spec, first = CellSpec(hidden, width, layers, "plain", precision, form), 10
    skip_where_absent(spec)
    for kinds in (("step",), ("text",)):
        _, whole = scan(spec, params, context, tokens, dropout_of(kinds))
        for texts, same in ((batch, True), (None, False)):
            part, dropout = replace(spec, mask_texts=texts), dropout_of(kinds, first * hidden)
            _, outputs = scan(part, params, context[first:], tokens[:, first:], dropout)
            found = error(outputs.astype(jnp.float32), whole[:, first:].astype(jnp.float32))
            assert (found < RESULTS[precision]) == same
