"""SmolLM2 and CASCADE making text with random weights, timed: by form of the products, and by what a CUDA graph holds.

A form replaces the functions of `smollm.token_step` that multiply, for this process; the library has one of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.memory import jax_memory
from benchmarks.harness.timing import spread
from newllm_jax.cascade import generate as cascade_generate
from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.generate import CascadeDecoder, cascade_params
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.decoding import loop
from newllm_jax.decoding.sampling import Sampling, choose, narrow
from newllm_jax.smollm import decoder as smollm_decoder
from newllm_jax.smollm import token_step
from newllm_jax.smollm.decoder import BaseDecoder
from newllm_jax.smollm.fused_decoder import decoder_for, kernel_obstacle
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.model import KVCache, SmolLM2, empty_cache
from newllm_jax.training.precision import PRECISIONS
from newllm_jax.training.step import count_parameters

PROMPT = 33
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
SAMPLINGS = {"greedy": Sampling(0, 0, 1), "top_p": Sampling()}
KERNELS_TIMES = 3  # larger than initial kernels, with which a text repeats one id: no check of the forms
STAGES, STAGE_THRESHOLD = 2, 0.0  # cosines of random vectors: about half of the tokens are handed on

COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
SMALLEST = {"xla_gpu_graph_min_graph_size": 1}
GRAPHS: dict[str, dict[str, Any]] = {  # what XLA records into CUDA graphs, by the options of its compiler
    "XLA's choice": {},
    "nothing": {"xla_gpu_enable_command_buffer": ""},
    "every kernel": {"xla_gpu_enable_command_buffer": COMMANDS, **SMALLEST},
    "conditionals": {"xla_gpu_enable_command_buffer": f"{COMMANDS},CONDITIONAL", **SMALLEST},
    "the loop": {"xla_gpu_enable_command_buffer": f"{COMMANDS},CONDITIONAL,WHILE", **SMALLEST},
    "the loop, unrolled": {
        "xla_gpu_enable_command_buffer": f"{COMMANDS},CONDITIONAL,WHILE",
        "xla_gpu_command_buffer_unroll_loops": True,
        **SMALLEST,
    },
}


def rows_sum(x: jax.Array, table: jax.Array, precision: Any, result: Any = None) -> jax.Array:
    """The same as sums over rows of products, in float32, whatever the precision."""
    products = x.astype(jnp.float32)[:, None, :] * table.astype(jnp.float32)[None]
    return jnp.sum(products, axis=-1).astype(result or x.dtype)


def attend_by_sums(query: jax.Array, cache: Any, position: jax.Array, precision: Any) -> jax.Array:
    """`token_step.attend` without dots."""
    keys, values = (each.astype(jnp.float32)[:, :, :, None, :] for each in cache)  # [B, S, K, 1, D]
    wide = query.astype(jnp.float32)[:, None] * query.shape[-1] ** -0.5  # [B, 1, K, G, D]
    scores = jnp.sum(wide * keys, axis=-1)  # [B, S, K, G]
    seen = (jnp.arange(keys.shape[1]) <= position)[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=1)
    return jnp.sum(weights[..., None] * values, axis=1).astype(query.dtype).reshape(len(query), -1)


SUMS = {"multiply": rows_sum, "multiply_rows": partial(rows_sum, result=jnp.float32)}
FORMS: dict[str, dict[str, Any]] = {
    "dots": {
        "stored_kernel": lambda kernel: kernel,
        "kernel_columns": lambda kernel, first: kernel[:, first:],
        "multiply": lambda x, kernel, precision: jnp.dot(x, kernel, precision=PRECISIONS[precision]),
    },
    "dots with rows": {},  # as in the library
    "sums of rows": SUMS,
    "sums, attention too": {**SUMS, "attend": attend_by_sums},
}
ONE_KERNEL = "one kernel"  # all layers of a token, as the library makes one text where the GPU can


def use_form(name: str) -> None:
    """Replaces the products of this process by those of a form."""
    for function, replacement in FORMS.get(name, {}).items():
        for module in (token_step, smollm_decoder, cascade_generate):
            if hasattr(module, function):
                setattr(module, function, replacement)


def enlarged(params: Any) -> Any:
    """Parameters of a SmolLM2 or a stage with larger kernels."""
    backbone = params["backbone"]
    blocks = jax.tree.map(lambda leaf: leaf * KERNELS_TIMES if leaf.ndim == 3 else leaf, backbone["blocks"])
    return {**params, "backbone": {**backbone, "blocks": blocks}}


def random_base(llama: LlamaConfig, precision: str) -> tuple[SmolLM2, Any]:
    """A model with random weights; strict float32, or bfloat16 all through."""
    model = SmolLM2(llama, dtype=DTYPES[precision])
    init = jax.jit(lambda key: enlarged(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
    return model, init(jax.random.key(0))


def random_decoder(llama: LlamaConfig, precision: str, stage_layers: int) -> tuple[Any, Any, int]:
    """The base's decoder, its parameters and the number of the base's; with `stage_layers`, of a base with stages."""
    model, params = random_base(llama, precision)
    size = count_parameters(params)
    if not stage_layers:
        return BaseDecoder(model), params, size
    stage = Stage(stage_config(llama, stage_layers))
    stages = [
        TrainedStage(enlarged(init_stage(stage, 0, number)), STAGE_THRESHOLD) for number in range(1, STAGES + 1)
    ]  # fmt: skip
    return CascadeDecoder(model, stage, STAGES, "cosine"), cascade_params(params, stages), size


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Rows of one form, one for each case of the task; one that fails is a row that says so."""
    use_form(task["form"])
    rows = []
    for case in task["cases"]:
        try:
            row = measure_case(LlamaConfig(**task["llama"]), case, task)
        except Exception as error:
            row = {"error": (f"{type(error).__name__}: {error}".splitlines() or ["?"])[0][:300]}
        rows.append({"form": task["form"], **case, **row})
    return {"rows": rows}


def measure_case(llama: LlamaConfig, case: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Makes texts of `tokens` tokens over and over: tokens a second after the first call, and seconds until then."""
    loop.GPU_OPTIONS = GRAPHS[case["graphs"]]
    loop.compiled_calls.cache_clear()
    decoder, params, size = random_decoder(llama, case["precision"], case.get("stage_layers", 0))
    if task["form"] == ONE_KERNEL:
        if obstacle := kernel_obstacle(decoder.model):
            raise ValueError(obstacle)
        decoder = decoder_for(decoder.model, texts=1)
    batch, tokens = case["batch"], task["tokens"]
    prompts = np.random.default_rng(0).integers(0, llama.vocab_size, (batch, PROMPT))
    keys = jax.random.split(jax.random.key(0), batch)

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return loop.generated_tokens(
            decoder, params, prompts, tokens, task["capacity"], SAMPLINGS[case["sampling"]], keys, None,
            case["per_call"],
        )  # fmt: skip

    return time_texts(pieces, task["repeats"]) | {"base_parameters": size, **jax_memory()}


def time_texts(pieces: Any, repeats: int) -> dict[str, Any]:
    """Times streams of ids and exits `[B, n]`, which are made anew for every repeat; the first one compiles."""
    rates, firsts, made, prepared = [], [], [], 0.0
    for repeat in range(repeats + 1):
        started, arrivals, made = time.perf_counter(), [], []
        for piece in pieces():
            arrivals.append(time.perf_counter())
            made.append(piece)
        if repeat == 0:
            prepared = arrivals[0] - started
            continue
        firsts.append(arrivals[0] - started)
        counted, begun = (made[1:], arrivals[0]) if len(made) > 1 else (made, started)
        rates.append(sum(ids.size for ids, _ in counted) / (arrivals[-1] - begun))
    exits = np.concatenate([taken.ravel() for _, taken in made])
    return {
        "prepare_seconds": prepared, "first_seconds": spread(firsts), "tokens_per_second": spread(rates),
        "ids": np.concatenate([ids[0] for ids, _ in made]).tolist(), "exits": np.bincount(exits).tolist(),
    }  # fmt: skip


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_ids(model: SmolLM2, params: Any, cache: KVCache, ids: jax.Array) -> tuple[KVCache, jax.Array]:
    """Reads `ids [1, T]`, layers scanned: the cache after them and the logits `[V]` of what follows."""
    states: Any = model.apply({"params": params}, ids, cache, method="hidden")
    logits: Any = model.apply({"params": params}, states.last[:, -1], method="logits")
    return states.cache, logits[0]


@partial(jax.jit, static_argnums=0)
def next_id(sampling: Sampling, logits: jax.Array, key: jax.Array) -> jax.Array:
    """The id chosen from logits `[V]`."""
    return choose(narrow(logits, sampling), sampling, key)


def measure_host_loop(task: dict[str, Any]) -> dict[str, Any]:
    """The loop of version 0.1.0: three programs and an answer to the host for every token."""
    llama, case = LlamaConfig(**task["llama"]), {"batch": 1, "per_call": 1, "graphs": "XLA's choice"}
    model, params = random_base(llama, "fp32")
    prompt = np.random.default_rng(0).integers(0, llama.vocab_size, (1, PROMPT))
    sampling = SAMPLINGS["greedy"]

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        cache, _ = read_ids(model, params, empty_cache(llama, 1, task["capacity"]), jnp.asarray(prompt[:, :-1]))
        token, key = int(prompt[0, -1]), jax.random.key(0)
        for position in range(task["tokens"]):
            cache, logits = read_ids(model, params, cache, jnp.asarray([[token]]))
            token = int(next_id(sampling, logits, jax.random.fold_in(key, position)))
            yield np.asarray([[token]]), np.zeros((1, 1), np.int32)

    row = {"form": "host asked per token", "precision": "fp32", "sampling": "greedy", **case}
    row |= time_texts(pieces, task["repeats"]) | {"base_parameters": count_parameters(params), **jax_memory()}
    return {"rows": [row]}
