"""The bits of single operations, as JSON: `determinism` runs this in several processes and compares.

Each operation is computed several times from the same inputs; what is printed is a hash of each result, and the norm of
the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.cascade.stage.model import Stage, init_stage
from newllm_jax.cascade.stage.updates import build_stage_training
from newllm_jax.config import CascadeConfig
from newllm_jax.decoding.sampling import Sampling, choose, narrow
from newllm_jax.finetuning.loss import sequence_loss
from newllm_jax.newllm.dropout import Dropout, Rate
from newllm_jax.newllm.loss import cross_entropy
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, CellSpec
from newllm_jax.newllm.recurrence.gradients import bias_gradient, kernel_gradient
from newllm_jax.newllm.recurrence.scan import forms_for, scan
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import SmolLM2, parameter_shapes
from newllm_jax.training.precision import dot, resolve_precision, supported_precisions
from newllm_jax.training.step import Totals, init_state
from tests.reliability.tiny import CUTTABLE_LLAMA

REPEATS, SAMPLING = 5, Sampling(0.8, 50, 0.9)
TIME, BATCH, HIDDEN, CONTEXT, VOCABULARY = 63, 64, 256, 256, 1000
LLAMA = LlamaConfig(**CUTTABLE_LLAMA)
DRAW = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(0.05 * DRAW.standard_normal(shape), jnp.float32)


def ids(limit: int, *shape: int) -> jax.Array:
    return jnp.asarray(DRAW.integers(0, limit, shape), jnp.int32)


def time_loop(precision: Any) -> tuple[Callable[..., Any], list[Any]]:
    spec = CellSpec(HIDDEN, CONTEXT, 2, precision=precision)
    spec = replace(spec, form=forms_for(spec, BATCH, TIME)[0])
    dropout = CellDropout(Dropout(jnp.array([3, 4], jnp.uint32), Rate.from_share(0.1)))
    params = CellParams(
        normal(CONTEXT, HIDDEN),
        ((normal(HIDDEN, HIDDEN), normal(HIDDEN)),),
        (normal(HIDDEN, 3 * CONTEXT), normal(3 * CONTEXT)),
        (1 + normal(CONTEXT), normal(CONTEXT)),
    )

    def total(params: Any, context: jax.Array, tokens: jax.Array) -> jax.Array:
        last, outputs = scan(spec, params, context, tokens, dropout)
        return jnp.sum(last) + jnp.sum(outputs.astype(jnp.float32))

    return jax.value_and_grad(total, (0, 1, 2)), [params, normal(BATCH, CONTEXT), normal(TIME, BATCH, HIDDEN)]


def stage_update() -> tuple[Callable[..., Any], list[Any]]:
    stage = Stage(LLAMA, resolve_precision("auto"))
    shared = build_stage_training(stage, CascadeConfig())
    params = init_stage(stage, 0, 1)
    data = normal(64, LLAMA.hidden_size), ids(320, 64)

    def update(params: Any, data: Any) -> Any:
        order = jnp.arange(64, dtype=jnp.int32).reshape(2, 32)
        state = init_state(jax.tree.map(jnp.copy, params), shared.optimizer)  # the updates take it over
        return shared.training.updates(state, Totals.zero(), data, order, 0, 2, jax.random.key(0))

    return update, [params, data]


def llama_gradient() -> tuple[Callable[..., Any], list[Any]]:
    loss = sequence_loss(SmolLM2(LLAMA, resolve_precision("auto")))
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), parameter_shapes(LLAMA))
    present = jnp.ones(8, bool)
    return jax.grad(lambda params, ids: loss(params, ids, present, None, None)[0].loss), [params, ids(320, 8, 129)]


def operations() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Functions and their arguments by name."""
    embedding = jax.grad(lambda table, ids, weights: jnp.sum(table[ids] * weights))
    words, states = (VOCABULARY, TIME, BATCH), normal(TIME, BATCH, HIDDEN)
    found: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "gradient of an embedding (scatter-add)": (
            embedding, [normal(VOCABULARY, HIDDEN), ids(*words), normal(TIME, BATCH, HIDDEN)]
        ),
        "gradient of chosen logits (scatter-add)": (
            jax.grad(lambda logits, ids: jnp.sum(jnp.take_along_axis(logits, ids[..., None], -1) ** 2)),
            [normal(TIME, BATCH, VOCABULARY), ids(*words)],
        ),
        "sum over steps and texts": (bias_gradient, [states]),
        "cross-entropy with its gradients": (
            jax.value_and_grad(
                lambda kernel, bias, states, targets: cross_entropy(
                    "fp32", kernel, bias, states, targets, targets > 0
                ).loss, (0, 1, 2),
            ),
            [normal(HIDDEN, VOCABULARY), normal(VOCABULARY), states, ids(*words)],
        ),
        "update of a stage": stage_update(),
        "gradient of a Llama": llama_gradient(),
        "choice of a word": (
            lambda logits, key: choose(narrow(logits, SAMPLING), SAMPLING, key), [normal(VOCABULARY), jax.random.key(1)]
        ),
    }  # fmt: skip
    for name in supported_precisions():
        found[f"product, {name}"] = (partial(dot, precision=name), [normal(2048, 1024), normal(1024, 512)])
        found[f"gradient of a kernel, {name}"] = (partial(kernel_gradient, precision=name), [states, states])
        found[f"time loop with its gradients, {name}"] = time_loop(name)
    return found


def digest(tree: Any) -> str:
    """A hash of all arrays of a tree."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


def norm(tree: Any) -> float:
    """Of all numbers of a tree, in float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jax.device_get(tree))]
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves)))


def main() -> None:
    found = {}
    for name, (function, arguments) in operations().items():
        compiled = jax.jit(function) if name != "update of a stage" else function  # compiled already
        results = [compiled(*arguments) for _ in range(REPEATS)]
        found[name] = {"hashes": list(map(digest, results)), "norm": norm(results[0])}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
