"""Every form of the products makes the same text, and the benchmark's loop of before makes it too."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.generation import CASE
from benchmarks.subjects import jax_generation
from benchmarks.tables.generation import text_table
from newllm_jax.cascade import generate as cascade_generate
from newllm_jax.decoding import loop
from newllm_jax.smollm import decoder, token_step
from newllm_jax.smollm.llama_config import LlamaConfig

LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8
)  # fmt: skip
TASK = {"llama": dataclasses.asdict(LLAMA), "tokens": 12, "capacity": 64, "repeats": 1}


@pytest.fixture(autouse=True)
def library_form():
    """The library's own functions are put back."""
    modules, names = (
        (token_step, decoder, cascade_generate),
        {name for form in jax_generation.FORMS.values() for name in form},
    )
    kept = [(module, name, getattr(module, name)) for module in modules for name in names if hasattr(module, name)]
    yield
    for module, name, function in kept:
        setattr(module, name, function)
    loop.GPU_OPTIONS = {}
    loop.compiled_calls.cache_clear()
    jax.clear_caches()


@pytest.mark.parametrize("form", jax_generation.FORMS)
def test_forms_make_one_text(form, monkeypatch):
    monkeypatch.setattr(jax_generation, "KERNELS_TIMES", 20)  # in so small a model
    [before] = jax_generation.measure_host_loop(TASK)["rows"]
    cases = [CASE | {"per_call": 4}, CASE | {"batch": 2}, CASE | {"stage_layers": 1}]
    alone, together, cascade = jax_generation.measure(TASK | {"form": form, "cases": cases})["rows"]
    assert alone["ids"] == together["ids"] == before["ids"] and len(set(before["ids"])) > 3
    assert len(cascade["ids"]) == 12 and len(cascade["exits"]) > 1
    assert (alone["exits"], together["exits"]) == ([12], [24])


@pytest.mark.parametrize("form", jax_generation.FORMS)
def test_keys_and_values_alone_in_every_form(form):
    """The part of a kernel that writes them is found however it is stored."""
    _, params = jax_generation.random_base(LLAMA, "fp32")

    def written():
        layers = token_step.unstack_layers(params["backbone"]["blocks"])
        shape = (2, 8, LLAMA.num_kv_heads, LLAMA.head_dim)
        caches = [(jnp.zeros(shape), jnp.zeros(shape))] * LLAMA.num_layers
        x = jax.random.normal(jax.random.key(1), (2, LLAMA.hidden_size))
        return token_step.write_keys_and_values(LLAMA, "fp32", layers, caches, x, jnp.int32(3))

    expected = written()
    jax_generation.use_form(form)
    for ours, theirs in zip(jax.tree.leaves(written()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_case_that_fails_is_a_row(monkeypatch):
    def fails(*_):
        raise RuntimeError("no graph\nmore lines")

    monkeypatch.setattr(jax_generation, "random_decoder", fails)
    [row] = jax_generation.measure(TASK | {"form": "dots", "cases": [CASE]})["rows"]
    assert row == {"form": "dots", **CASE, "error": "RuntimeError: no graph"}
    assert "RuntimeError: no graph" in text_table({"rows": [row]})


def test_options_are_known_to_this_xla():
    """Every set of options is accepted by the compiler, on a CPU too, which does nothing with it."""
    for options in jax_generation.GRAPHS.values():
        assert jax.jit(lambda x: x + 1, compiler_options=options or None)(1) == 2
    assert importlib.import_module("benchmarks.generation").HOST_LOOP.endswith("measure_host_loop")
