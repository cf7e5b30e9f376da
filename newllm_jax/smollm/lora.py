"""LoRA adapters (Hu et al. 2022): a low-rank change of the frozen kernels of some layers.

    W' = W + s A B        W [in, out] frozen;  A [in, r] drawn at random, B [r, out] zero at the start;  s the scale

So an adapted model equals the frozen one, bit for bit, until the first update. Adapters are merged into the kernels
inside the step that trains them: every model and every fast path then takes them as ordinary parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.training.precision import PRECISIONS
from newllm_jax.training.step import Params

SCALE = 2.0  # alpha / rank, as PEFT names it


def adapter_shapes(config: LlamaConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """Input and output size of each adapted kernel of a layer, as the parameters of `Block` name them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "attention": {
            "q_proj": (hidden, query), "k_proj": (hidden, value), "v_proj": (hidden, value), "o_proj": (query, hidden),
        },
        "mlp": {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)},
    }  # fmt: skip


def init_adapters(config: LlamaConfig, rank: int, key: jax.Array) -> Params:
    """Adapters of all layers of a model: for each kernel `a [L, in, rank]`, N(0, 1 / in), and `b [L, rank, out]`, 0."""
    layers, number, adapters = config.num_layers, 0, dict[str, Any]()
    for part, kernels in adapter_shapes(config).items():
        adapters[part] = {}
        for name, (inputs, outputs) in kernels.items():
            drawn = jax.random.normal(jax.random.fold_in(key, number), (layers, inputs, rank)) * inputs**-0.5
            adapters[part][name] = {"a": drawn, "b": jnp.zeros((layers, rank, outputs))}
            number += 1
    return adapters


def merge_adapters(params: Params, adapters: Params) -> Params:
    """The parameters of a model with its adapters added to its kernels; embedding, norms and head as they are."""
    blocks = params["backbone"]["blocks"]
    merged = {**blocks, **{part: _merge_part(blocks[part], adapters[part]) for part in adapters}}
    return {**params, "backbone": {**params["backbone"], "blocks": merged}}


def _merge_part(kernels: Params, adapters: Params) -> Params:
    strict = PRECISIONS["fp32"]
    return {
        name: {"kernel": kernel["kernel"] + SCALE * jnp.einsum(
            "lir,lro->lio", adapters[name]["a"], adapters[name]["b"], precision=strict)}
        for name, kernel in kernels.items()
    }  # fmt: skip
