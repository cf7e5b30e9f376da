"""New-LLM re-created in PyTorch, as fast as its plain operations allow, and an LSTM of the same size for scale.

The same algebra as the library's: the token's part of the first layer and the logits are one product each outside the
time loop, the three gates are one product. Importing this module needs PyTorch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness.timing import loss_curve, time_updates
from benchmarks.subjects.torch_training import Tensor, TorchTraining, device, memory, read_weights, set_precision, torch
from newllm_jax.config import NewLLMConfig

functional: Any = torch.nn.functional
PAD = 0


def cell(context: Tensor, token: Tensor, weights: list[Tensor], dropout: float) -> tuple[Tensor, Tensor]:
    """One time step: `context [batch, context]`, `token [batch, hidden]` -> next context, last hidden state."""
    context_in, *layers, gates, gates_bias, scale, bias = weights
    hidden = functional.dropout(torch.relu(torch.addmm(token, context, context_in.t())), dropout)
    for kernel, layer_bias in zip(layers[::2], layers[1::2], strict=True):
        hidden = functional.dropout(torch.relu(functional.linear(hidden, kernel, layer_bias)), dropout)
    forget, update, delta = functional.linear(hidden, gates, gates_bias).chunk(3, -1)
    mixed = torch.sigmoid(forget) * context + torch.sigmoid(update) * delta
    normed = functional.layer_norm(mixed, scale.shape, scale, bias, 1e-5)
    return normed.clamp(-10, 10), hidden


def newllm_loss(weights: dict[str, Tensor], num_layers: int, dropout: float, step: Any, ids: Tensor) -> Any:
    """Summed cross-entropy of `ids [batch, time + 1]` over the targets that are not padding, and their number."""
    names = [f"hidden_{layer}_{part}" for layer in range(2, num_layers + 1) for part in ("kernel", "bias")]
    names = ["context_in_kernel", *names, "gates_kernel", "gates_bias", "norm_scale", "norm_bias"]
    inside = [weights[f"cell/{name}"] for name in names]
    embedded = functional.embedding(ids[:, :-1].t(), weights["embed/embedding"])
    tokens = functional.linear(embedded, weights["token_in/kernel"], weights["token_in/bias"])
    context = tokens.new_zeros(len(ids), inside[0].shape[1])
    hidden = []
    for token in tokens.unbind(0):
        context, state = step(context, token, inside, dropout)
        hidden.append(state)
    logits = functional.linear(torch.stack(hidden), weights["logits/kernel"], weights["logits/bias"])
    return summed_loss(logits, ids[:, 1:].t())


def summed_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the targets that are not padding, and their number."""
    total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum")
    return total, (targets != PAD).sum()


def kernel_is_transposed(name: str) -> bool:
    """The library's kernels are `[in, out]`."""
    return name.endswith("kernel")


def newllm_training(task: dict[str, Any], dropout: float, graph: bool, compiled: bool) -> TorchTraining:
    """The peer's training from the library's initial weights."""
    config = NewLLMConfig.from_dict(task["config"])
    weights = read_weights(task["weights"], kernel_is_transposed)
    step = torch.compile(cell, dynamic=False) if compiled else cell
    loss = partial(newllm_loss, weights, config.num_layers, dropout, step)
    return _training(task, config, loss, list(weights.values()), graph)


def lstm_training(task: dict[str, Any], dropout: float) -> TorchTraining:
    """cuDNN's LSTM: 2 layers of 512 on an embedding of 256, with the same data and optimiser."""
    config, vocabulary = NewLLMConfig.from_dict(task["config"]), task["vocabulary"]
    embed, hidden = 256, 512
    table = torch.nn.Embedding(vocabulary, embed, device=device())
    lstm = torch.nn.LSTM(embed, hidden, 2, dropout=dropout, device=device())
    head = torch.nn.Linear(hidden, vocabulary, device=device())

    def loss(ids: Tensor) -> tuple[Tensor, Tensor]:
        states = lstm(table(ids[:, :-1].t()))[0]
        return summed_loss(head(functional.dropout(states, dropout)), ids[:, 1:].t())

    trained = [weight for module in (table, lstm, head) for weight in module.parameters()]
    return _training(task, config, loss, trained, graph=False)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """A peer's row: `kind` is eager, compile, graph, compiled_graph (the step compiled, then captured) or lstm."""
    kind, config = task["kind"], NewLLMConfig.from_dict(task["config"])
    precision = "fp32" if task["precision"] == "fp32" or device() == "cpu" else "tf32"
    torch.manual_seed(0)
    set_precision(precision)
    graph, compiled = "graph" in kind, "compile" in kind
    if kind == "lstm":
        peer = lstm_training(task, config.dropout)
    else:
        peer = newllm_training(task, config.dropout, graph, compiled)
    parameters = sum(weight.numel() for weight in peer.trained)
    row = {"parameters": parameters, "precision": precision, "dropout": config.dropout}
    row |= time_updates(peer, task["updates"], task["repeats"]) | memory()
    if kind != "lstm":
        del peer
        set_precision("fp32")
        plain = newllm_training(task, 0.0, graph, compiled)
        row["losses_strict"] = loss_curve(plain, task["agreement_updates"])
    return row


def _training(
    task: dict[str, Any], config: NewLLMConfig, loss: Any, trained: list[Tensor], graph: bool
) -> TorchTraining:
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate, fused=True, capturable=graph)
    sequences, order = np.load(task["sequences"]).astype(np.int64), np.load(task["order"])
    return TorchTraining(loss, trained, optimizer, [sequences], order, config.clip_norms[0], graph)
