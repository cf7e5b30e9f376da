"""Text from designs other than the published one, token by token: re-entry, and skipped layers.

Every token is sent to one of the two paths by the rule of the whole-text pass (`cascade.stage.designs`), the tokens of
the prompt included. Layers that a token does not pass get its keys and values from the stream that it has there, so
later tokens see it. In a batch, what only hard tokens need is computed if one of its tokens is hard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.cascade.hardness import is_hard, token_scores
from newllm_jax.cascade.probe import probe_gains
from newllm_jax.cascade.run import DesignRun
from newllm_jax.cascade.stage.designs import SkipDesign, StageDesign, skipped_stream
from newllm_jax.decoding.loop import Decoder
from newllm_jax.smollm.decoder import BaseDecoder, TokenWeights, token_logits, token_weights
from newllm_jax.smollm.lora import merge_adapters
from newllm_jax.smollm.model import HiddenStates, KVCache, Route, empty_cache, rms_norm
from newllm_jax.smollm.token_step import (
    LayerCache,
    multiply,
    run_layers,
    stored_kernel,
    unstack_caches,
    write_keys_and_values,
)
from newllm_jax.training.step import Params


class DesignParams(NamedTuple):
    """The parameters of a design: the frozen base, what was trained, the probe (or None), and the threshold."""

    base: Params
    trained: Params
    probe: Params | None
    threshold: Any


class DesignCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      base: of the layers of the base.
      stage: of the layers of a stage; empty where there is none.
      length: how many positions are filled, a scalar.
    """

    base: tuple[LayerCache, ...]
    stage: tuple[LayerCache, ...]
    length: jax.Array


class SkipWeights(NamedTuple):
    """What `SkipDecoder.step` reads: the adapted base, the linear map and the rest of the short head, the decision."""

    model: TokenWeights
    trained: Params
    frequent: jax.Array | None
    probe: Params
    threshold: jax.Array


@dataclass(frozen=True)
class SkipDecoder:
    """Easy tokens (exit 0) skip layers that hard ones (exit 1) pass."""

    design: SkipDesign

    exits = 2

    def prepare(self, params: DesignParams) -> SkipWeights:
        """The adapted base, layers one by one."""
        merged = merge_adapters(params.base, params.trained["adapters"])
        kept = {name: params.trained[name] for name in ("skip",) if name in params.trained}
        if "short" in params.trained:
            kept["short"] = jax.tree.map(stored_kernel, params.trained["short"])
        rows = self.design.config.short_head
        frequent = stored_kernel(self.design.head_table(params.base)[:rows].T) if rows else None
        assert params.probe is not None  # the configuration demands one
        return SkipWeights(token_weights(self.design.base, merged), kept, frequent, params.probe, params.threshold)

    def start(self, params: DesignParams, ids: jax.Array, length: jax.Array, capacity: int) -> DesignCache:
        """The cache after the first `length` of `ids [B, T]`."""
        design, llama = self.design, self.design.base.config
        merged = merge_adapters(params.base, params.trained["adapters"])
        (first, stop), caches = design.config.skipped_layers, list[tuple[LayerCache, ...]]()

        def run(begin: int, end: int, x: jax.Array, route: Route | None = None) -> jax.Array:
            if begin == end:
                return x
            part = design.run_range(merged, begin, end, x, route, _cache_of(design.base, end - begin, ids, capacity))
            caches.append(_unstacked(part))
            return part.residual

        before = run(0, first, jnp.take(params.base["embed"]["embedding"], ids, axis=0))
        assert params.probe is not None
        hard = is_hard(-probe_gains(params.probe, before), params.threshold)
        passed = run(first, stop, before, Route(jnp.broadcast_to(hard, (stop - first, *hard.shape))))
        x = jnp.where(hard[..., None], passed, skipped_stream(params.trained, before, design.base.precision))
        run(stop, llama.num_layers, x)
        return DesignCache(tuple(cache for part in caches for cache in part), (), length)

    def step(
        self, weights: SkipWeights, cache: DesignCache, tokens: jax.Array
    ) -> tuple[DesignCache, jax.Array, jax.Array]:
        """The cache with `tokens [B]`, logits `[B, V]`, and the path of each, `[B]`."""
        base, position = self.design.base, cache.length
        llama, (first, stop), layers = base.config, self.design.config.skipped_layers, weights.model.layers
        sized = llama, base.precision
        x = jnp.take(weights.model.embedding, tokens, axis=0)
        x, below = run_layers(*sized, layers[:first], cache.base[:first], x, position)
        hard = is_hard(-probe_gains(weights.probe, x), weights.threshold)
        between = layers[first:stop], cache.base[first:stop], x, position
        passed, middle = jax.lax.cond(
            jnp.any(hard),
            lambda: run_layers(*sized, *between, hard),
            lambda: (x, write_keys_and_values(*sized, *between)),
        )
        x = jnp.where(hard[:, None], passed, skipped_stream(weights.trained, x, base.precision))
        x, above = run_layers(*sized, layers[stop:], cache.base[stop:], x, position)
        x = jnp.where(position < cache.base[0][0].shape[1], x, jnp.nan)
        last = rms_norm(x, weights.model.norm, llama.rms_norm_eps)
        logits = self._logits(weights, last, hard)
        return DesignCache((*below, *middle, *above), (), position + 1), logits, hard.astype(jnp.int32)

    def _logits(self, weights: SkipWeights, last: jax.Array, hard: jax.Array) -> jax.Array:
        """The predictions `[B, V]`: by the whole head where a token is hard, else by the short one if there is one."""
        base = self.design.base
        if weights.frequent is None:
            return token_logits(base, weights.model, last)
        short, frequent = weights.trained["short"], weights.frequent
        rare = multiply(multiply(last, short["p"], base.precision), short["q"], base.precision)
        logits = jnp.concatenate([multiply(last, frequent, base.precision), rare], axis=-1).astype(jnp.float32)
        return jax.lax.cond(
            jnp.any(hard),
            lambda: jnp.where(hard[:, None], token_logits(base, weights.model, last), logits),
            lambda: logits,
        )


class StageWeights(NamedTuple):
    """What `StageDecoder.step` reads: the base and the stage, whose head may be the base's, and the decision."""

    base: TokenWeights
    stage: TokenWeights
    stage_params: Params
    probe: Params | None
    threshold: jax.Array


@dataclass(frozen=True)
class StageDecoder:
    """Easy tokens leave with the base's prediction (exit 0), hard ones pass the stage (exit 1)."""

    design: StageDesign

    exits = 2

    def prepare(self, params: DesignParams) -> StageWeights:
        """Base and stage, layers one by one."""
        stage = self.design.stage_params(params.base, params.trained)
        weights = token_weights(self.design.base, params.base), token_weights(self.design.model, stage)
        return StageWeights(*weights, stage, params.probe, params.threshold)

    def start(self, params: DesignParams, ids: jax.Array, length: jax.Array, capacity: int) -> DesignCache:
        """The cache after the first `length` of `ids [B, T]`."""
        design, base = self.design, self.design.base
        depths = tuple(range(design.entry, base.config.num_layers + 1))
        states: Any = base.apply(
            {"params": params.base},
            ids,
            _cache_of(base, base.config.num_layers, ids, capacity),
            depths,
            method="hidden",
        )
        if design.config.context == "token":
            return DesignCache(_unstacked(states), (), length)
        model, stage = design.model, design.stage_params(params.base, params.trained)
        logits = base.apply({"params": params.base}, states.last, method="logits")
        hard = self._is_hard(params.probe, params.threshold, states.embedding, states.last, logits)
        layers = model.config.num_layers
        streams = states.last[None] if design.config.entry_layer is None else states.at_depths
        held = streams[1:] if len(streams) > 1 else None
        route = Route(jnp.broadcast_to(hard, (layers, *hard.shape)), held)
        entered: Any = model.apply(
            {"params": stage}, streams[0], _cache_of(model, layers, ids, capacity), route=route, method="from_hidden"
        )
        return DesignCache(_unstacked(states), _unstacked(entered), length)

    def _is_hard(
        self, probe: Params | None, threshold: jax.Array, embedding: jax.Array, last: jax.Array, logits: Any
    ) -> jax.Array:
        """Which tokens `[...]` are hard; logits that the criterion does not need are not computed under `jax.jit`."""
        if probe is not None:
            return is_hard(-probe_gains(probe, last), threshold)
        return is_hard(token_scores(self.design.config.criterion, embedding, last, logits), threshold)

    def step(
        self, weights: StageWeights, cache: DesignCache, tokens: jax.Array
    ) -> tuple[DesignCache, jax.Array, jax.Array]:
        """The cache with `tokens [B]`, logits `[B, V]`, and the path of each, `[B]`."""
        base, config, position = self.design.base, self.design.config, cache.length
        llama, entry, layers = base.config, self.design.entry, weights.base.layers
        embedding = jnp.take(weights.base.embedding, tokens, axis=0)
        x, caches = run_layers(llama, base.precision, layers[:entry], cache.base[:entry], embedding, position)
        streams, written = [x], list(caches)
        for layer, layer_cache in zip(layers[entry:], cache.base[entry:], strict=True):
            x, caches = run_layers(llama, base.precision, [layer], [layer_cache], x, position)
            streams.append(x)
            written += caches
        x = jnp.where(position < cache.base[0][0].shape[1], x, jnp.nan)
        last = rms_norm(x, weights.base.norm, llama.rms_norm_eps)
        needs_logits = weights.probe is None and config.criterion != "cosine"
        logits = token_logits(base, weights.base, last) if needs_logits else None
        hard = self._is_hard(weights.probe, weights.threshold, embedding, last, logits)
        if logits is None:
            needed = jnp.any(~hard) if config.prediction == "replaces" else jnp.array(True)
            nothing = jnp.zeros((len(tokens), llama.vocab_size))
            logits = jax.lax.cond(needed, lambda: token_logits(base, weights.base, last), lambda: nothing)
        streams = [last] if config.entry_layer is None else streams
        logits, entered = self._enter(weights, cache.stage, streams, logits, hard, position)
        return DesignCache(tuple(written), entered, position + 1), logits, hard.astype(jnp.int32)

    def _enter(
        self,
        weights: StageWeights,
        caches: tuple[LayerCache, ...],
        streams: list[jax.Array],
        logits: jax.Array,
        hard: jax.Array,
        position: jax.Array,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """The stage on hard tokens, keys and values of the others from the base's streams; the predictions `[B, V]`."""
        model, layers = self.design.model, weights.stage.layers
        sized = model.config, model.precision

        def stream(number: int, own: jax.Array) -> jax.Array:
            """What a token that does not pass the stage has before its layer `number`."""
            return streams[number] if len(streams) > 1 else own

        def run() -> tuple[jax.Array, tuple[LayerCache, ...]]:
            x, written = streams[0], list[LayerCache]()
            if self.design.config.context == "token":
                alone: Any = model.apply({"params": weights.stage_params}, x[:, None], method="from_hidden")
                last = alone.last[:, 0]
            else:
                for number, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
                    before = x
                    x, new = run_layers(*sized, [layer], [cache], x, position)
                    x = jnp.where(hard[:, None], x, stream(number + 1, before))
                    written += new
                last = rms_norm(x, weights.stage.norm, model.config.rms_norm_eps)
            own = token_logits(model, weights.stage, last)
            if self.design.config.prediction == "mixes":
                own = jnp.logaddexp(jax.nn.log_softmax(logits), jax.nn.log_softmax(own))
            return jnp.where(hard[:, None], own, logits), tuple(written)

        def leave() -> tuple[jax.Array, tuple[LayerCache, ...]]:
            written = list[LayerCache]()
            for number, (layer, cache) in enumerate(zip(layers, caches, strict=False)):
                x = stream(number, streams[0])
                written += write_keys_and_values(*sized, [layer], [cache], x, position)
            return logits, tuple(written)

        return jax.lax.cond(jnp.any(hard), run, leave)


def design_decoder(run: DesignRun) -> tuple[Decoder, Any, list[float]]:
    """The decoder of a run, its parameters, and what a token costs on the easy path and on the hard one.

    Where the run keeps no stage, it is the base's.
    """
    if not run.kept_stages:
        return BaseDecoder(run.base.model), run.base.params, [1.0]
    design, costs = run.trained.design, run.trained.design.costs(run.base.model.config)
    decoder: Any = SkipDecoder(design) if isinstance(design, SkipDesign) else StageDecoder(design)
    threshold = np.float32(run.routing.threshold)
    params = DesignParams(run.trained.base, run.trained.params, run.routing.probe, threshold)
    return decoder, params, [costs.easy, costs.hard]


def _cache_of(model: Any, layers: int, ids: jax.Array, capacity: int) -> KVCache:
    """An empty cache for some layers of a model."""
    return empty_cache(replace(model.config, num_layers=layers), len(ids), capacity, model.dtype)


def _unstacked(states: HiddenStates) -> tuple[LayerCache, ...]:
    assert states.cache is not None
    return unstack_caches(states.cache.keys, states.cache.values)
