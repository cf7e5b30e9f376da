"""Text made by transformers with the weights of `jax_generation`. Importing this module needs PyTorch."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.timing import spread
from benchmarks.subjects.jax_generation import PROMPT, SAMPLINGS, random_base
from benchmarks.subjects.torch_training import Tensor, device, memory, set_precision, torch
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.weights import save_model
from newllm_jax.training.step import count_parameters

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Arrivals:
    """A streamer of transformers that keeps the time and the ids of each token; the first it gets is the prompt."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.seconds.append(time.perf_counter())
        self.ids += value.flatten().tolist()[:1] if len(self.seconds) > 1 else []

    def end(self) -> None:
        pass


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """A row for each case of the task: tokens a second of one text after its first token."""
    transformers: Any = importlib.import_module("transformers")
    set_precision("fp32")
    llama, folder = LlamaConfig(**task["llama"]), Path(task["folder"])
    _, params = random_base(llama, "fp32")
    save_model(folder, llama, params)
    rows, size = [], count_parameters(params)
    del params
    prompt = np.random.default_rng(0).integers(0, llama.vocab_size, (1, PROMPT))
    for case in task["cases"]:
        model = transformers.LlamaForCausalLM.from_pretrained(folder).to(device(), TYPES[case["precision"]]).eval()
        row = time_texts(model, torch.from_numpy(prompt).to(device()), case, task)
        rows.append({"form": "transformers", **case, **row, "base_parameters": size, **memory()})
    return {"rows": rows}


def time_texts(model: Any, prompt: Tensor, case: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Makes texts of `tokens` tokens over and over, the first one to warm up."""
    sampling, tokens = SAMPLINGS[case["sampling"]], task["tokens"]
    chosen = {"do_sample": False} if sampling.temperature == 0 else {
        "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
    }  # fmt: skip
    rates, firsts, prepared, ids = [], [], 0.0, []
    for repeat in range(task["repeats"] + 1):
        arrivals, started = Arrivals(), time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
                pad_token_id=0, streamer=arrivals, **chosen,
            )  # fmt: skip
        _, first, *_, last = arrivals.seconds
        if repeat == 0:
            prepared = first - started
            continue
        firsts.append(first - started)
        rates.append((len(arrivals.ids) - 1) / (last - first))
        ids = arrivals.ids
    return {
        "prepare_seconds": prepared, "first_seconds": spread(firsts), "tokens_per_second": spread(rates), "ids": ids,
        "exits": [len(ids)],
    }  # fmt: skip
