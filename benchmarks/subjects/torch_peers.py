"""The training of a peer on the data of New-LLM's recipes, and what a search records of it.

As in the library: the order of the examples follows from seed and epoch, the last batch of windows is filled up with
absent examples, whose targets are not counted, and a stream hands its state on from piece to piece and starts every
epoch from zero. Products are in bf16 on a GPU in training, in strict float32 in evaluation and on a CPU. Importing this
module needs PyTorch.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.subjects.peer_config import PeerConfig
from benchmarks.subjects.torch_newllm import PAD, summed_loss
from benchmarks.subjects.torch_peer_models import Gpt, Lstm, State
from benchmarks.subjects.torch_training import WARM_UP_UPDATES, Tensor, TorchTraining, device, set_precision, torch
from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import NumericalError
from newllm_jax.newllm.tokenizer import BOS
from newllm_jax.newllm.wikitext import SPLITS, Wikitext, stream_rows
from newllm_jax.training.optimizer import BETAS, EPSILON
from newllm_jax.training.split import batches, epoch_order

EVALUATED_WINDOWS = 512  # at a time


@dataclass(frozen=True)
class PeerData:
    """The data of a task.

    Attributes:
      examples: ids `[N, T + 1]` of every split; of a stream the first piece of each row, the second of each, and so on.
      rows: of a stream, how many rows of a split are read side by side; None for windows.
      vocabulary: the number of words.
    """

    examples: dict[str, np.ndarray]
    rows: dict[str, int] | None
    vocabulary: int

    @classmethod
    def of(cls, data: Wikitext, config: NewLLMConfig) -> PeerData:
        """The data as New-LLM reads them with a configuration."""
        examples = {split: data.examples(split, config) for split in SPLITS}
        rows = {split: stream_rows(split, config) for split in SPLITS} if config.text == "stream" else None
        return cls(examples, rows, len(data.tokenizer))

    def order(self, config: PeerConfig, epoch: int) -> np.ndarray:
        """The training examples of an epoch (from 1), `[steps, B]`; -1 where one is absent."""
        examples = len(self.examples["train"])
        if self.rows is None:
            return batches(epoch_order(config.seed, epoch, examples), config.batch_size)
        return np.arange(examples, dtype=np.int32).reshape(-1, self.rows["train"])


def learning_rates(config: PeerConfig, updates: int) -> np.ndarray:
    """Of every update: linear warm-up from 0, then a cosine to 0 over all of the run; as the library's schedule."""
    number = np.arange(updates)
    done = np.clip((number - config.warmup_steps) / max(updates - config.warmup_steps, 1), 0, 1)
    cosine = config.learning_rate * 0.5 * (1 + np.cos(math.pi * done))
    warm = config.learning_rate * number / max(config.warmup_steps, 1)
    return np.where(number < config.warmup_steps, warm, cosine).astype(np.float32)


def kept_shares(decay: float, updates: int) -> np.ndarray:
    """What a moving average keeps of itself at every update n (from 1): `min(decay, (n - 1) / (n + 9))`."""
    past = np.arange(updates, dtype=np.float32)
    return np.minimum(np.float32(decay), past / (past + 10))


class PeerTraining(TorchTraining):
    """A peer in training. An update replays a CUDA graph where one could be captured.

    Attributes:
      updates: how many there were, int64 `[1]`.
      averages: the moving averages that are evaluated instead of the weights; empty where there are none.
      state: of a stream, the state after the last update.
    """

    def __init__(self, config: PeerConfig, data: PeerData) -> None:
        torch.manual_seed(config.seed)
        self.config, self.task = config, data
        self.model = peer_model(config, data).to(device())
        weights, first = list(self.model.parameters()), data.order(config, 1)
        rate = torch.zeros((), device=device())  # read anew by every update
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        on_gpu = device() == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPSILON, fused=True, capturable=on_gpu)
        examples = data.examples["train"].astype(np.int64)
        with_absent = np.concatenate([examples, np.full_like(examples[:1], PAD)])  # index -1
        super().__init__(self.training_loss, weights, optimizer, [with_absent], self.indices(first), config.clip)
        total = len(first) * config.epochs
        self.rate, self.updates = rate, torch.zeros(1, dtype=torch.int64, device=device())
        self.rates = torch.from_numpy(learning_rates(config, total)).to(device())
        self.kept = torch.from_numpy(kept_shares(config.ema_decay, total)).to(device())
        self.averages = [weight.detach().clone() for weight in weights] if config.ema_decay else []
        self.state: State = self.model.start(config.batch_size)
        self.after: State = []

    def indices(self, order: np.ndarray) -> np.ndarray:
        """An order whose absent examples are the one after the last, which has no targets."""
        return np.where(order < 0, len(self.task.examples["train"]), order)

    def training_loss(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of a batch, and the number of its targets."""
        with torch.autocast(device(), torch.bfloat16, enabled=device() == "cuda"):
            logits, after = self.model(ids[:, :-1], self.state)
        self.after = [each.detach() for each in after]
        return peer_loss(self.model, logits, ids[:, 1:])

    def update(self) -> None:
        """One update, the average after it, and the state for the next one. Nothing in it waits for the device."""
        self.rate.copy_(self.rates.index_select(0, self.updates)[0])
        super().update()
        if self.averages:
            kept = self.kept.index_select(0, self.updates)[0]
            with torch.no_grad():
                torch._foreach_mul_(self.averages, kept)
                torch._foreach_add_(self.averages, torch._foreach_mul([w.detach() for w in self.trained], 1 - kept))
        if self.task.rows:
            for before, after in zip(self.state, self.after, strict=True):
                before.copy_(after)
        self.updates += 1

    def begin(self) -> str:
        """Captures an update, for which the first ones are made; says how updates are made from here on."""
        self.model.train()
        if device() == "cpu" or len(self.order) <= WARM_UP_UPDATES:
            return "eager"
        self.graph = torch.cuda.CUDAGraph()
        try:
            self.prepare()
            return "CUDA graph"
        except RuntimeError as error:
            self.graph = None
            torch.cuda.synchronize()
            return f"eager: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}"

    def epoch(self, number: int) -> float:
        """Makes the updates of an epoch (from 1) that are left of it: the mean training loss."""
        self.model.train()
        if number > 1:
            self.order.copy_(torch.from_numpy(self.indices(self.task.order(self.config, number)).astype(np.int64)))
            self.step.zero_()
            for each in self.state:
                each.zero_()
        self.run(len(self.order) - int(self.step))
        return self.loss()

    def evaluated(self) -> list[Tensor]:
        """The weights that are evaluated."""
        return self.averages or [weight.detach() for weight in self.trained]

    def measure(self, split: str, weights: Sequence[Tensor]) -> float:
        """The mean loss of a split with some weights; the trained ones are in their place again afterwards."""
        own = [weight.detach().clone() for weight in self.trained]
        with torch.no_grad():
            torch._foreach_copy_(self.trained, list(weights))
            loss = evaluate(self.model, self.task, split)
            torch._foreach_copy_(self.trained, own)
        return loss


def peer_model(config: PeerConfig, data: PeerData) -> Any:
    """The model with its initial weights, on the CPU. In a stream PAD and BOS can never follow."""
    if config.kind == "gpt":
        return Gpt(config, data.vocabulary, data.examples["train"].shape[1] - 1)
    return Lstm(config, data.vocabulary, (PAD, BOS) if data.rows else ())


def peer_loss(model: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over targets `[B, T]` that are not padding, in float32, and their number."""
    return summed_loss(logits.float(), targets.t() if model.time_major else targets)


def evaluate(model: Any, data: PeerData, split: str) -> float:
    """The mean loss of a split, without dropout, in float32; of a stream with the state carried from its beginning."""
    model.eval()
    examples = torch.from_numpy(data.examples[split].astype(np.int64)).to(device())
    rows = data.rows[split] if data.rows else min(EVALUATED_WINDOWS, len(examples))
    total, count = torch.zeros((), dtype=torch.float64, device=device()), 0
    state = model.start(rows)
    with torch.no_grad():
        for ids in examples.split(rows):
            logits, after = model(ids[:, :-1], state if data.rows else model.start(len(ids)))
            loss, targets = peer_loss(model, logits, ids[:, 1:])
            total, count, state = total + loss, count + targets, after
    return float(total) / int(count)


def train_peer(config: PeerConfig, data: PeerData, test: bool = False) -> dict[str, Any]:
    """A trial: the curve, the best epoch on the validation split, times; with `test` that epoch's test figures too.

    Raises:
      NumericalError: a loss that is not finite.
    """
    set_precision("fp32")  # of evaluation; training has autocast
    gc.collect()
    if device() == "cuda":
        torch.cuda.empty_cache()  # of the peer before
    started = time.perf_counter()
    training = PeerTraining(config, data)
    how = training.begin()
    curve: list[dict[str, float]] = []
    best, kept = math.inf, training.evaluated()
    for number in range(1, config.epochs + 1):
        begun = time.perf_counter()
        train_loss = training.epoch(number)
        seconds = time.perf_counter() - begun
        loss = training.measure("validation", training.evaluated())
        if not math.isfinite(train_loss + loss):
            raise NumericalError(f"the loss is not finite in epoch {number}")
        curve.append({"train_loss": round(train_loss, 5), "val_loss": loss, "val_ppl": perplexity(loss),
                      "train_seconds": round(seconds, 3)})  # fmt: skip
        if loss < best:
            best, kept = loss, [weight.clone() for weight in training.evaluated()]
    row = {
        "parameters": sum(weight.numel() for weight in training.trained),
        "device": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
        "precision": "bf16" if device() == "cuda" else "fp32", "updates": how,
        "updates_per_epoch": len(training.order), "epochs": curve,
        "best": {"epoch": 1 + [entry["val_loss"] for entry in curve].index(best), "val_loss": best,
                 "val_ppl": perplexity(best)},
    }  # fmt: skip
    if test:
        loss = training.measure("test", kept)
        row["test"] = {"loss": loss, "ppl": perplexity(loss)}
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def perplexity(loss: float) -> float:
    """The exponential of a mean loss in nats; the largest float where that is larger."""
    return math.exp(min(loss, 700.0))
