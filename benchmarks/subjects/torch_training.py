"""Training in PyTorch as a training under measurement: eager, or all of an update captured once as a CUDA graph.

Importing this module needs PyTorch; the programs ask `program.has_torch` first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.harness.memory import process_memory

torch: Any = importlib.import_module("torch")

WARM_UP_UPDATES = 3  # on a side stream before a capture, as PyTorch's documentation asks
Tensor = Any
Loss = Callable[..., tuple[Tensor, Tensor]]  # (*batch) -> summed loss, number of targets


def device() -> str:
    """Where the peers compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_precision(precision: str) -> None:
    """TF32 products or strict float32 ones. A precision that the peers do not have is replaced by TF32."""
    tf32 = precision != "fp32" and device() == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def read_weights(path: str, transpose: Callable[[str], bool]) -> dict[str, Tensor]:
    """The library's initial weights as leaves that want gradients; kernels as PyTorch keeps them, `[out, in]`."""
    weights = {}
    with np.load(path) as arrays:
        for name in arrays.files:
            value = torch.from_numpy(arrays[name])
            value = value.transpose(-1, -2) if transpose(name) else value
            weights[name] = value.contiguous().to(device()).requires_grad_()
    return weights


def memory() -> dict[str, Any]:
    """The most memory allocated on the GPU; without one, what the process held."""
    if device() == "cpu":
        return process_memory()
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "peak_memory_of": "device"}


class TorchTraining:
    """Forward, backward, clipping and optimiser on batches in a given order; data and order lie on the device.

    Attributes:
      unreached: weights that the loss does not depend on. Their gradient is zero, not missing, so that weight decay
        reaches them as it does in the library.
    """

    def __init__(
        self,
        loss: Loss,
        trained: Sequence[Tensor],
        optimizer: Any,
        data: Sequence[np.ndarray],
        order: np.ndarray,
        clip: float | None = None,
        graph: bool = False,
        unreached: Sequence[Tensor] = (),
    ) -> None:
        self.loss_of, self.trained, self.optimizer, self.clip = loss, list(trained), optimizer, clip
        self.data = [torch.from_numpy(array).to(device()) for array in data]
        self.order = torch.from_numpy(order.astype(np.int64)).to(device())
        self.step = torch.zeros(1, dtype=torch.int64, device=device())
        self.total = torch.zeros((), device=device())
        self.count = torch.zeros((), dtype=torch.int64, device=device())
        self.graph = torch.cuda.CUDAGraph() if graph else None
        fixed = {id(weight) for weight in unreached}
        for weight in unreached:
            weight.grad = torch.zeros_like(weight)
        self.reached = [weight for weight in self.trained if id(weight) not in fixed]

    def prepare(self) -> int:
        """Eager: the first update, which initialises libraries and compiles. Graph: warm-up and capture."""
        if self.graph is None:
            self.run(1)
            return 1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_UPDATES):
                self.update()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.update()  # recorded, not made
        torch.cuda.synchronize()
        return WARM_UP_UPDATES

    def update(self) -> None:
        """One update. Nothing in it waits for the device."""
        rows = self.order.index_select(0, self.step)[0]
        total, count = self.loss_of(*(array.index_select(0, rows) for array in self.data))
        for weight in self.reached:
            weight.grad = None
        (total / count.clamp(min=1)).backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.total += total.detach()
        self.count += count
        self.step += 1

    def run(self, updates: int) -> None:
        """Makes updates, then synchronises."""
        for _ in range(updates):
            if self.graph is None:
                self.update()
            else:
                self.graph.replay()
        if device() == "cuda":
            torch.cuda.synchronize()

    def loss(self) -> float:
        """The mean loss per target since the last call."""
        mean = float(self.total) / int(self.count)
        self.total.zero_()
        self.count.zero_()
        return mean
