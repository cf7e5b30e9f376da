"""Both paths of a design over whole splits: the loss of each token on either, its score, the losses of a routed pass.

All of it in strict float32, batch by batch. Arrays of a split are NumPy, `[chunks, 128]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.bars import progress_bar
from newllm_jax.cascade.extraction import Advance, batch_chunks, read_chunks
from newllm_jax.cascade.hardness import hardness_threshold, is_hard
from newllm_jax.cascade.probe import probe_gains, train_probe
from newllm_jax.cascade.stage.designs import AnyDesign
from newllm_jax.cascade.states import States, release
from newllm_jax.config import CascadeConfig, Criterion
from newllm_jax.smollm.model import SmolLM2
from newllm_jax.training.losses import token_losses
from newllm_jax.training.mesh import place_beside
from newllm_jax.training.precision import PRECISIONS
from newllm_jax.training.step import Params


@dataclass(frozen=True)
class TrainedDesign:
    """A design with its parameters.

    Attributes:
      design: in strict float32.
      base: the frozen base's parameters, on the device.
      params: what was trained, on the device.
    """

    design: AnyDesign
    base: Params
    params: Params


@dataclass(frozen=True)
class Routing:
    """How tokens are sent to one of the two paths.

    Attributes:
      threshold: tokens that score at or below it take the hard path.
      probe: the parameters of the probe that scores them; None for other criteria.
    """

    threshold: float
    probe: Params | None = None


@dataclass(frozen=True)
class TokenLosses:
    """Losses (nats) and hits (bool) of the tokens of a split, each `[chunks, 128]`."""

    losses: np.ndarray
    hits: np.ndarray

    @property
    def mean(self) -> float:
        """The mean loss."""
        return float(np.mean(self.losses, dtype=np.float64))


def in_batches(
    function: Callable[..., Any], params: Params, *arrays: np.ndarray, advance: Advance | None = None
) -> tuple[np.ndarray, ...]:
    """What a function of batches gives for whole arrays `[chunks, ...]`: all calls have the same shapes.

    Args:
      params: that the function reads; the devices on which they lie share out each batch.
      advance: called after each batch with its number of chunks; None: that of a bar of its own.
    """
    with nullcontext(advance) if advance else progress_bar("chunks", len(arrays[0])) as moved:
        results = list(each_batch(function, params, *arrays, advance=moved))
    return tuple(np.concatenate(parts) for parts in zip(*results, strict=True))


def each_batch(
    function: Callable[..., Any], params: Params, *arrays: np.ndarray, advance: Advance = lambda chunks: None
) -> Iterator[list[np.ndarray]]:
    """What `in_batches` puts together, batch by batch: for what is too much to be in memory as a whole."""
    size = batch_chunks()
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        count = len(parts[0])
        padded = [np.pad(part, [(0, size - count)] + [(0, 0)] * (part.ndim - 1)) for part in parts]
        for array in arrays:
            release(array)
        yield [part[:count] for part in jax.device_get(function(*place_beside(params, padded)))]
        advance(count)


def base_losses(
    base: SmolLM2, params: Params, chunks: np.ndarray, criterion: Criterion, advance: Advance | None = None
) -> tuple[TokenLosses, np.ndarray]:
    """Losses of the base alone for chunks `[chunks, 129]`, and the scores of its tokens by a criterion of one pass."""

    def read(ids: jax.Array) -> tuple[jax.Array, ...]:
        _, _, scores, losses, hits = read_chunks(base, criterion, params, ids)
        return losses, hits, scores

    losses, hits, scores = in_batches(read, params, chunks, advance=advance)
    return TokenLosses(losses, hits), scores


def routed_losses(
    trained: TrainedDesign, chunks: np.ndarray, hard: np.ndarray, advance: Advance | None = None
) -> TokenLosses:
    """The losses where the tokens `hard [chunks, 128]` (bool) take the hard path and the others the easy one."""
    function = partial(routed_pass, trained.design, trained.base, trained.params)
    return TokenLosses(*in_batches(function, trained.base, chunks, hard, advance=advance))


def both_paths(trained: TrainedDesign, chunks: np.ndarray) -> tuple[TokenLosses, TokenLosses]:
    """The losses where all tokens take the easy path, and where all take the hard one."""
    everywhere = np.ones((len(chunks), chunks.shape[1] - 1), bool)
    return routed_losses(trained, chunks, ~everywhere), routed_losses(trained, chunks, everywhere)


def decision_states(trained: TrainedDesign, chunks: np.ndarray, folder: Path | None = None) -> np.ndarray:
    """The hidden states `[tokens, H]` that a probe reads, of one chunk or more.

    Args:
      folder: where they are a memory-mapped file; None where they stay in memory.

    Raises:
      OSError: the disk takes no more.
    """
    function = partial(_decide, trained.design, trained.base, trained.params)
    batches = each_batch(function, trained.base, chunks)
    (hidden,) = next(batches)
    states = States(hidden.shape[-1], folder)
    states.append(hidden.reshape(-1, states.width))
    for (hidden,) in batches:
        states.append(hidden.reshape(-1, states.width))
    return states.array()


def hidden_moment(base: SmolLM2, params: Params, chunks: np.ndarray) -> np.ndarray:
    """The mean `[H, H]` of h h^T over the last hidden states h of the base; over no chunks the identity."""
    size = base.config.hidden_size
    if not len(chunks):
        return np.eye(size, dtype=np.float32)
    total = np.zeros((size, size), np.float32)
    for (moments,) in each_batch(partial(_moments, base, params), params, chunks):
        for each in moments:  # in order, as NumPy adds up the first axis: the same bits
            total += each
    return total / np.float32(len(chunks))


def token_path_scores(
    trained: TrainedDesign, strict: SmolLM2, routing_probe: Params | None, chunks: np.ndarray
) -> np.ndarray:
    """The score of each token by the design's criterion: low is hard; a probe's is its predicted gain, negated."""
    criterion = trained.design.config.criterion
    if criterion != "probe":
        return base_losses(strict, trained.base, chunks, criterion)[1]
    function = partial(_probe_scores, trained.design, trained.base, trained.params, routing_probe)
    return in_batches(function, trained.base, chunks)[0]


def build_routing(
    trained: TrainedDesign,
    strict: SmolLM2,
    train: np.ndarray,
    calibration: np.ndarray,
    config: CascadeConfig,
    folder: Path | None = None,
) -> Routing:
    """The probe where the criterion is one, trained on the gains of the `train` chunks, and the threshold.

    The threshold is a quantile of the scores of the `calibration` chunks: that of `hard_ratio`, or of the share of hard
    tokens with which a token costs `flops` on average.

    Args:
      folder: where the hidden states that the probe is trained on are written; None where they stay in memory.
    """
    probe = None
    if config.criterion == "probe":
        easy, hard = both_paths(trained, train)
        hidden = decision_states(trained, train, folder)
        probe = train_probe(hidden, (easy.losses - hard.losses).ravel(), config.seed)
    scores = token_path_scores(trained, strict, probe, calibration)
    share = config.hard_ratio
    if config.flops is not None:
        share = trained.design.costs(strict.config).hard_share(config.flops)
    return Routing(share_threshold(scores, share), probe)


def share_threshold(scores: np.ndarray, share: float) -> float:
    """The threshold at which this share of the scores is hard: `hardness_threshold`; at 0 no token is, at 1 every one.

    Other tokens score beyond these, so at 0 and 1 it is the least and the largest number.
    """
    numbers = np.finfo(np.float32)
    if share <= 0:
        return float(numbers.min)
    return float(numbers.max) if share >= 1 else hardness_threshold(scores, share)


def hard_tokens(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Which tokens take the hard path, bool."""
    return np.asarray(is_hard(scores, threshold))


@partial(jax.jit, static_argnums=0)
def routed_pass(
    design: AnyDesign, base: Params, params: Params, ids: jax.Array, hard: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The losses and hits of `ids [B, 129]`, each `[B, 128]`; see `routed_losses`."""
    decision = design.decide(base, params, ids[:, :-1])
    return token_losses(design.logits(base, params, decision, hard), ids[:, 1:])


@partial(jax.jit, static_argnums=0)
def _moments(base: SmolLM2, params: Params, ids: jax.Array) -> tuple[jax.Array]:
    last: Any = base.apply({"params": params}, ids[:, :-1], method="hidden")
    return (jnp.einsum("btg,bth->bgh", last.last, last.last, precision=PRECISIONS["fp32"]) / (ids.shape[1] - 1),)


@partial(jax.jit, static_argnums=0)
def _decide(design: AnyDesign, base: Params, params: Params, ids: jax.Array) -> tuple[jax.Array]:
    return (design.decide(base, params, ids[:, :-1]).hidden,)


@partial(jax.jit, static_argnums=0)
def _probe_scores(
    design: AnyDesign, base: Params, params: Params, probe: Params, ids: jax.Array
) -> tuple[jax.Array]:  # fmt: skip
    return (-probe_gains(probe, design.decide(base, params, ids[:, :-1]).hidden),)
