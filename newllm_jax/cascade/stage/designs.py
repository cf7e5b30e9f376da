"""Designs of CASCADE other than the published one: two paths through a base, and what is trained of them.

The base has layers 0 ... L-1; x_l is its residual stream before layer l, so x_L is what its final norm reads.

*Re-entry* at layer n (`StageDesign`). Easy tokens leave with the base's prediction. Hard ones enter the base again:

    y_n = x_n;   y_(l+1) = layer'_l(y_l) where a token is hard, else x_(l+1)         l = n ... L-1
    logits' = head(norm(y_L))

layer' starts as the base's own layer, so the stage starts as the base itself. At n = L, layer' are copies of the base's
top layers that add nothing at first. Without a layer to enter, a stage is new layers that read norm(x_L), as published.

*Skipping* layers a ... b-1 (`SkipDesign`). Hard tokens take all layers, easy ones go on at layer b with what they have:

    x_b = layers_(a ... b-1)(x_a) where a token is hard, else x_a + x_a A B          A B: a linear map, of rank 0: none

With b = L easy tokens leave for good: an early exit. With a *short head* their scores of rare ids are approximate:
those of the first K ids are products with the embedding E, those of the others go through rank r,

    logits = [last E_K^T, last P Q]          P [H, r], Q [r, V - K]: at first the best such product for E, then trained

In both designs every layer makes keys and values of the stream
that a token has there, so hard tokens see the tokens before them, whichever path those took.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import jax
import jax.numpy as jnp

from newllm_jax.config import CascadeConfig, Precision, check
from newllm_jax.errors import InputError
from newllm_jax.smollm.flops import Costs, PathCosts, probe_cost
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.lora import init_adapters, merge_adapters
from newllm_jax.smollm.model import HiddenStates, KVCache, Route, SmolLM2, rms_norm, take_layers
from newllm_jax.training.precision import PRECISIONS, dot
from newllm_jax.training.step import Params

LEAST_MOMENT = 1e-6  # of hidden states in a direction, as a share of the largest
NO_LOGITS = ("cosine", "probe")  # criteria that need no prediction of the base


class Decision(NamedTuple):
    """What a design knows of tokens where their path is chosen, each `[B, T, ...]`.

    Attributes:
      hidden: `[B, T, H]`, what a probe reads.
      states: what the paths go on with.
    """

    hidden: jax.Array
    states: Any


class Design(Protocol):
    """Two paths through a base. Hashable, for `jax.jit`."""

    config: CascadeConfig

    def init(self, base: Params, seed: int, moment: jax.Array) -> Params:
        """The trained parameters at the start. `moment [H, H]`: the mean of h h^T over last hidden states h."""
        ...

    def decide(self, base: Params, trained: Params, ids: jax.Array) -> Decision:
        """Reads `ids [B, T]` up to the place where paths are chosen."""
        ...

    def logits(self, base: Params, trained: Params, decision: Decision, hard: jax.Array) -> jax.Array:
        """The predictions `[B, T, V]` where tokens `hard [B, T]` (bool) take the hard path."""
        ...

    def costs(self, llama: LlamaConfig) -> PathCosts:
        """Of the two paths."""
        ...


@dataclass(frozen=True)
class StageDesign:
    """A stage that hard tokens enter after a whole pass of the base, which easy ones leave with its prediction.

    Attributes:
      config: of the run.
      base: the base's architecture, in the precision of the pass.
      precision: of the stage's products.
    """

    config: CascadeConfig
    base: SmolLM2
    precision: Precision

    @property
    def entry(self) -> int:
        """The layer before which the base is entered again; its number of layers where a stage follows all of them."""
        layers = self.base.config.num_layers
        return layers if self.config.entry_layer is None else self.config.entry_layer

    @property
    def model(self) -> SmolLM2:
        """The architecture of the stage."""
        llama, own_head = self.base.config, self.config.head == "own"
        layers = llama.num_layers - self.entry or self.config.stage_layers
        return SmolLM2(
            replace(llama, num_layers=layers, tie_embeddings=own_head or llama.tie_embeddings), self.precision,
            recompute=self.base.recompute,
        )  # fmt: skip

    def init(self, base: Params, seed: int, moment: jax.Array) -> Params:
        config, key = self.config, jax.random.fold_in(jax.random.key(seed), 1)
        if config.start == "random":
            params = self.model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
            return {"backbone": params["backbone"], **({"embed": params["embed"]} if config.head == "own" else {})}
        frozen, trained = self._first_layers(base), dict[str, Any]()
        if config.weights == "lora":
            trained["adapters"] = init_adapters(self.model.config, config.rank, key)
        else:
            trained["backbone"] = frozen
        if config.head == "own":
            tied = self.base.config.tie_embeddings
            trained["embed"] = base["embed"] if tied else {"embedding": base["lm_head"]["kernel"].T}
        return jax.tree.map(jnp.array, trained)

    def _first_layers(self, base: Params) -> Params:
        """The base's layers that a stage starts as, with the final norm."""
        layers = self.base.config.num_layers
        count = self.model.config.num_layers
        backbone = take_layers(self.base.config, base, layers - count, layers)[1]["backbone"]
        if self.entry < layers:
            return backbone
        silent = jax.tree.map(lambda kernel: kernel, backbone)  # a copy of the tables
        for part, name in (("attention", "o_proj"), ("mlp", "down_proj")):
            silent["blocks"][part][name]["kernel"] = jnp.zeros_like(silent["blocks"][part][name]["kernel"])
        return silent

    def stage_params(self, base: Params, trained: Params) -> Params:
        """The parameters of `model`."""
        head = {name: trained.get(name, base[name]) for name in ("embed", "lm_head") if name in base}
        if "embed" in trained:
            head.pop("lm_head", None)
        if "adapters" in trained:
            return {**merge_adapters({"backbone": self._first_layers(base)}, trained["adapters"]), **head}
        return {"backbone": trained["backbone"], **head}

    def decide(self, base: Params, trained: Params, ids: jax.Array) -> Decision:
        layers = self.base.config.num_layers
        depths = tuple(range(self.entry, layers + 1)) if self.config.context == "sequence" else (self.entry,)
        states = cast(HiddenStates, self.base.apply({"params": base}, ids, depths=depths, method="hidden"))
        streams = states.at_depths
        if self.config.entry_layer is None:
            streams = states.last[None]
        return Decision(states.last, streams)

    def stage_logits(self, base: Params, trained: Params, decision: Decision, hard: jax.Array | None) -> jax.Array:
        """The stage's own predictions `[B, T, V]`; `hard` None: all tokens pass it."""
        first, *_ = decision.states
        params, model = self.stage_params(base, trained), self.model
        if self.config.context == "token":
            alone = first.reshape(-1, 1, first.shape[-1])
            states = cast(HiddenStates, model.apply({"params": params}, alone, method="from_hidden"))
            last = states.last.reshape(first.shape)
        else:
            route = None
            if hard is not None:
                held = decision.states[1:] if self.entry < self.base.config.num_layers else None
                route = Route(jnp.broadcast_to(hard, (model.config.num_layers, *hard.shape)), held)
            states = cast(HiddenStates, model.apply({"params": params}, first, route=route, method="from_hidden"))
            last = states.last
        return cast(jax.Array, model.apply({"params": params}, last, method="logits"))

    def base_logits(self, base: Params, decision: Decision) -> jax.Array:
        """The base's predictions `[B, T, V]`."""
        return cast(jax.Array, self.base.apply({"params": base}, decision.hidden, method="logits"))

    def logits(self, base: Params, trained: Params, decision: Decision, hard: jax.Array) -> jax.Array:
        easy, stage = self.base_logits(base, decision), self.stage_logits(base, trained, decision, hard)
        if self.config.prediction == "mixes":
            stage = jnp.logaddexp(jax.nn.log_softmax(easy), jax.nn.log_softmax(stage))
        return jnp.where(hard[..., None], stage, easy)

    def costs(self, llama: LlamaConfig) -> PathCosts:
        cost, layers = Costs.from_config(llama), self.model.config.num_layers
        probe = probe_cost(llama) if self.config.criterion == "probe" else 0
        needs_both = self.config.criterion not in NO_LOGITS or self.config.prediction == "mixes"
        seen = layers * cost.keys_and_values if self.config.context == "sequence" else 0
        easy = cost.base + probe + seen
        hard = cost.layers * cost.layer + probe + layers * cost.layer + cost.head * (2 if needs_both else 1)
        return PathCosts(easy / cost.base, hard / cost.base)


@dataclass(frozen=True)
class SkipDesign:
    """Easy tokens skip a range of layers; adapters on all layers are trained with both paths.

    Attributes:
      config: of the run.
      base: the base's architecture, in the precision of training.
    """

    config: CascadeConfig
    base: SmolLM2

    def init(self, base: Params, seed: int, moment: jax.Array) -> Params:
        key, hidden, rank = jax.random.key(seed), self.base.config.hidden_size, self.config.skip_rank
        trained: dict[str, Any] = {"adapters": init_adapters(self.base.config, self.config.rank, key)}
        if rank:
            drawn = jax.random.normal(jax.random.fold_in(key, 1), (hidden, rank)) * hidden**-0.5
            trained["skip"] = {"a": drawn, "b": jnp.zeros((rank, hidden))}
        if self.config.short_head:
            rare = self.head_table(base)[self.config.short_head :]
            trained["short"] = low_rank_product(rare, moment, self.config.short_rank)
        return trained

    def head_table(self, base: Params) -> jax.Array:
        """The rows `[V, H]` with which the head multiplies."""
        return base["embed"]["embedding"] if self.base.config.tie_embeddings else base["lm_head"]["kernel"].T

    def run_range(
        self,
        params: Params,
        first: int,
        stop: int,
        x: jax.Array,
        route: Route | None = None,
        cache: KVCache | None = None,
    ) -> HiddenStates:
        """Layers `first` to `stop` (exclusive) on the stream `x [B, T, H]`; `params`: of the adapted base."""
        config, part = take_layers(self.base.config, params, first, stop)
        model = self.base.clone(config=config)
        return cast(HiddenStates, model.apply({"params": part}, x, cache, route=route, method="from_hidden"))

    def decide(self, base: Params, trained: Params, ids: jax.Array) -> Decision:
        params = merge_adapters(base, trained["adapters"])
        x = jnp.take(base["embed"]["embedding"], ids, axis=0)
        first = self.run_range(params, 0, self.config.skipped_layers[0], x).residual
        return Decision(first, (params, first))

    def logits(self, base: Params, trained: Params, decision: Decision, hard: jax.Array) -> jax.Array:
        (params, x), (first, stop) = decision.states, self.config.skipped_layers
        route = Route(jnp.broadcast_to(hard, (stop - first, *hard.shape)))
        passed = self.run_range(params, first, stop, x, route).residual
        return self.logits_after(params, trained, x, passed, hard)

    def logits_after(
        self, params: Params, trained: Params, before: jax.Array, passed: jax.Array, hard: jax.Array
    ) -> jax.Array:
        """The predictions from the streams `[B, T, H]` before the skipped layers and, of hard tokens, after them."""
        llama, stop = self.base.config, self.config.skipped_layers[1]
        x = jnp.where(hard[..., None], passed, skipped_stream(trained, before, self.base.precision))
        if stop < llama.num_layers:
            last = self.run_range(params, stop, llama.num_layers, x).last
        else:
            last = rms_norm(x, params["backbone"]["norm"]["scale"], llama.rms_norm_eps)
        exact = cast(jax.Array, self.base.apply({"params": params}, last, method="logits"))
        if "short" not in trained:
            return exact
        return jnp.where(hard[..., None], exact, self.short_logits(params, trained, last))

    def short_logits(self, params: Params, trained: Params, last: jax.Array) -> jax.Array:
        """The predictions `[..., V]` of easy tokens, from their last hidden states `[..., H]`."""
        multiply, short = partial(dot, precision=self.base.precision), trained["short"]
        table = self.head_table(params)[: self.config.short_head]
        return jnp.concatenate([multiply(last, table.T), multiply(multiply(last, short["p"]), short["q"])], axis=-1)

    def costs(self, llama: LlamaConfig) -> PathCosts:
        cost, (first, stop) = Costs.from_config(llama), self.config.skipped_layers
        hard = cost.base + probe_cost(llama)
        easy = hard - (stop - first) * (cost.layer - cost.keys_and_values)
        easy += 2 * llama.hidden_size * self.config.skip_rank
        if exact := self.config.short_head:
            short = exact * llama.hidden_size
            short += self.config.short_rank * (llama.hidden_size + llama.vocab_size - exact)
            easy += short - cost.head
        return PathCosts(easy / cost.base, hard / cost.base)


AnyDesign: TypeAlias = StageDesign | SkipDesign


def low_rank_product(table: jax.Array, moment: jax.Array, rank: int) -> Params:
    """`p [H, rank]` and `q [rank, rows]`: the product nearest to `table^T [H, rows]` on the hidden states there are.

    With the moment M = E[h h^T] = R R^T, the mean of |h^T (p q - table^T)|^2 is the squared distance of R^T p q from
    R^T table^T, which is smallest where p q keeps the leading singular vectors of the latter.
    """
    strict = partial(jnp.matmul, precision=PRECISIONS["fp32"])
    values, vectors = jnp.linalg.eigh(moment)
    sizes = jnp.sqrt(jnp.maximum(values, LEAST_MOMENT * values[-1]))
    seen = strict(table, vectors * sizes)  # [rows, H]: R^T table^T, transposed
    _, directions = jnp.linalg.eigh(strict(seen.T, seen))
    leading = directions[:, -rank:]
    return {"p": strict(vectors / sizes, leading), "q": strict(leading.T, seen.T)}


def skipped_stream(trained: Params, x: jax.Array, precision: Precision) -> jax.Array:
    """The residual stream `[..., H]` of tokens that skip layers, after those."""
    if "skip" not in trained:
        return x
    return x + dot(dot(x, trained["skip"]["a"], precision), trained["skip"]["b"], precision)


def build_design(config: CascadeConfig, base: SmolLM2, precision: Precision) -> AnyDesign:
    """The design of a configuration on a base. Raises InputError where the base has too few layers."""
    layers = base.config.num_layers
    for name, layer in (
        ("entry_layer", config.entry_layer),
        ("skipped_layers", max(config.skipped_layers, default=None)),
    ):
        if layer is not None and layer > layers:
            raise InputError(f"{name}: the base has {layers} layers, not {layer}")
    check("short_head", config.short_head, f"below the {base.config.vocab_size} ids of the base",
          config.short_head < base.config.vocab_size)  # fmt: skip
    if config.skipped_layers:
        if config.skipped_layers[0] < 1:
            raise InputError("skipped_layers: the first must be at least 1, for a probe to read something")
        return SkipDesign(config, base.clone(precision=precision, recompute=config.recompute))
    if config.start == "base" and config.entry_layer == layers and config.stage_layers > layers:
        raise InputError(f"stage_layers: the base has {layers} layers to start as, not {config.stage_layers}")
    return StageDesign(config, base.clone(precision=precision, recompute=config.recompute), precision)
