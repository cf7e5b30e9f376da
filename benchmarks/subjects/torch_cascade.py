"""CASCADE's stage re-created in PyTorch, and its base as transformers has it. Importing this module needs PyTorch."""

from __future__ import annotations

import importlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.timing import loss_curve, spread, time_updates
from benchmarks.subjects.torch_training import Tensor, TorchTraining, device, memory, read_weights, set_precision, torch
from newllm_jax.config import CascadeConfig
from newllm_jax.smollm.llama_config import LlamaConfig

functional: Any = torch.nn.functional
BLOCKS = "backbone/blocks/"


def read_stage_weights(path: str) -> dict[str, Tensor]:
    """The library's initial weights, each block's a tensor of its own: `backbone/blocks/mlp/up_proj/kernel/3`."""
    weights = {}
    for name, value in read_weights(path, lambda name: name.endswith("kernel")).items():
        if name.startswith(BLOCKS):
            for layer, part in enumerate(value.detach().unbind(0)):
                weights[f"{name}/{layer}"] = part.clone().requires_grad_()
        else:
            weights[name] = value
    return weights


def is_query_or_key(name: str) -> bool:
    """Whether the weight sees no gradient: attention over one key is that key's value."""
    return "q_proj" in name or "k_proj" in name


def stage_loss(weights: dict[str, Tensor], llama: LlamaConfig, hidden: Tensor, targets: Tensor) -> Any:
    """Summed cross-entropy of `hidden [tokens, hidden]`, each token a text of length 1, and the number of targets."""
    groups = llama.num_heads // llama.num_kv_heads

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return functional.rms_norm(x, scale.shape, scale, llama.rms_norm_eps)

    x = hidden
    for layer in range(llama.num_layers):

        def weight(name: str, layer: int = layer) -> Tensor:
            return weights[f"{BLOCKS}{name}/{layer}"]

        value = functional.linear(norm(x, weight("attention_norm/scale")), weight("attention/v_proj/kernel"))
        shared = value.view(-1, llama.num_kv_heads, 1, llama.head_dim).expand(-1, -1, groups, -1).flatten(1)
        x = x + functional.linear(shared, weight("attention/o_proj/kernel"))
        normed = norm(x, weight("mlp_norm/scale"))
        gate = functional.silu(functional.linear(normed, weight("mlp/gate_proj/kernel")))
        up = functional.linear(normed, weight("mlp/up_proj/kernel"))
        x = x + functional.linear(gate * up, weight("mlp/down_proj/kernel"))
    logits = functional.linear(norm(x, weights["backbone/norm/scale"]), weights["embed/embedding"])
    total = functional.cross_entropy(logits, targets, reduction="sum")
    return total, torch.full((), len(targets), device=targets.device)


def stage_training(task: dict[str, Any], graph: bool) -> TorchTraining:
    """The peer's training from the library's initial weights: fused AdamW, whose decay reaches every weight."""
    config = CascadeConfig.from_dict(task["config"])
    llama = LlamaConfig(**{**task["llama"], "num_layers": config.stage_layers})
    weights = read_stage_weights(task["weights"])
    trained = list(weights.values())
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True, capturable=graph
    )
    with np.load(task["tokens"]) as tokens:
        data = [tokens["hidden"], tokens["targets"].astype(np.int64)]
    unreached = [value for name, value in weights.items() if is_query_or_key(name)]
    loss = partial(stage_loss, weights, llama)
    return TorchTraining(loss, trained, optimizer, data, np.load(task["order"]), graph=graph, unreached=unreached)


def measure_stage(task: dict[str, Any]) -> dict[str, Any]:
    """A peer's row: `kind` is eager or graph."""
    graph = task["kind"] == "graph"
    precision = "fp32" if task["precision"] == "fp32" or device() == "cpu" else "tf32"
    set_precision(precision)
    peer = stage_training(task, graph)
    row = {"parameters": sum(weight.numel() for weight in peer.trained), "precision": precision}
    row |= time_updates(peer, task["updates"], task["repeats"]) | memory()
    del peer
    set_precision("fp32")
    return {**row, "losses_strict": loss_curve(stage_training(task, graph), task["agreement_updates"])}


def measure_extraction(task: dict[str, Any]) -> dict[str, Any]:
    """transformers' Llama over the same chunks with the same weights, strict float32: same results, on the host."""
    transformers: Any = importlib.import_module("transformers")
    folder, batch = Path(task["folder"]), task["batch_chunks"]
    set_precision("fp32")
    with np.load(folder / "extraction.npz") as arrays:
        chunks, expected = arrays["chunks"], arrays["losses"]
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base").float().to(device()).eval()

    def read(ids: np.ndarray) -> list[np.ndarray]:
        on_device = torch.from_numpy(ids.astype(np.int64)).to(device())
        inputs, targets = on_device[:, :-1], on_device[:, 1:]
        last = model.model(inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(last)
        scores = functional.cosine_similarity(model.model.embed_tokens(inputs), last, dim=-1)
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return [part.cpu().numpy() for part in (last, scores, losses, logits.argmax(-1) == targets)]

    def extract(ids: np.ndarray) -> np.ndarray:
        parts = [read(ids[start : start + batch]) for start in range(0, len(ids), batch)]
        _, _, losses, _ = (np.concatenate([part[field] for part in parts]) for field in range(4))
        return losses

    with torch.inference_mode():
        started = time.perf_counter()
        extract(chunks[:batch])
        prepared, seconds, losses = time.perf_counter() - started, [], expected
        for _ in range(task["repeats"]):
            started = time.perf_counter()
            losses = extract(chunks)
            seconds.append(time.perf_counter() - started)
    return {
        "prepare_seconds": prepared, "pass_seconds": spread(seconds), **memory(),
        "largest_loss_difference": float(np.abs(losses - expected).max()),
    }  # fmt: skip
