"""Generation with designs: token by token the same as the whole text, and the text of the base where it should be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade.design_decoders import DesignParams, SkipDecoder, StageDecoder
from newllm_jax.cascade.probe import init_probe, probe_gains
from newllm_jax.cascade.stage.designs import SkipDesign
from newllm_jax.decoding.loop import generated_tokens
from newllm_jax.decoding.sampling import Sampling
from newllm_jax.smollm.decoder import BaseDecoder
from tests.cascade.conftest import REENTRY, SKIP

PROBE = jax.tree.map(
    lambda leaf: leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape), init_probe(16, 0)
)  # fmt: skip


def build(llama, settings, threshold, moved=0.3):
    design = llama.design(**settings)
    decoder = SkipDecoder(design) if isinstance(design, SkipDesign) else StageDecoder(design)
    probe = PROBE if settings["criterion"] == "probe" else None
    return design, decoder, DesignParams(llama.params, llama.init(design, moved), probe, np.float32(threshold))


@pytest.mark.parametrize("settings", [
    REENTRY, {**REENTRY, "prediction": "mixes"}, {**REENTRY, "weights": "own", "head": "own"},
    {**REENTRY, "context": "token"}, {**REENTRY, "entry_layer": 4, "stage_layers": 2},
    {**REENTRY, "criterion": "entropy"}, {**REENTRY, "entry_layer": None, "start": "random", "weights": "own"},
    SKIP, {**SKIP, "short_head": 20, "short_rank": 3, "skip_rank": 2}, {**SKIP, "skipped_layers": (2, 4)},
], ids=str)  # fmt: skip
def test_a_token_at_a_time_predicts_what_the_whole_text_does(llama, settings):
    """The prompt is read in one go, the rest token by token, three texts at once."""
    design, decoder, params = build(llama, settings, 0.0)
    decision = design.decide(llama.params, params.trained, llama.ids)
    if params.probe is not None:
        scores = -probe_gains(PROBE, decision.hidden)
    else:
        logits = llama.base.apply({"params": llama.params}, decision.hidden, method="logits")
        scores = jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1)
    ordered = np.sort(scores[:, 5:], axis=None)
    params = params._replace(threshold=np.float32(ordered[10:12].mean()))
    hard = np.asarray(scores <= params.threshold)
    assert hard[:, 5:].sum() == 11  # of 21: both paths are taken, also side by side
    expected = design.logits(llama.params, params.trained, decision, jnp.asarray(hard))
    cache = jax.jit(decoder.start, static_argnums=3)(params, np.pad(llama.ids[:, :5], [(0, 0), (0, 3)]), 5, 16)
    weights, step = jax.jit(decoder.prepare)(params), jax.jit(decoder.step)
    for position in range(5, 12):
        cache, found, exits = step(weights, cache, llama.ids[:, position])
        assert exits.tolist() == hard[:, position].astype(int).tolist()
        np.testing.assert_allclose(found, expected[:, position], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("settings", "threshold", "exit_number"), [
    (REENTRY, -np.inf, 0), (REENTRY, np.inf, 1), (SKIP, np.inf, 1),
], ids=["nobody is hard", "all pass a stage that is the base", "nobody skips"])  # fmt: skip
def test_where_both_paths_are_the_base_the_greedy_text_is_its_text(llama, settings, threshold, exit_number):
    def text(decoder, params):
        keys = jax.random.key(0)[None]
        pieces = list(generated_tokens(decoder, params, llama.ids[:1], 12, 32, Sampling(temperature=0), keys))
        return [np.concatenate(each, axis=1)[0].tolist() for each in zip(*pieces, strict=True)]

    expected, _ = text(BaseDecoder(llama.base), llama.params)
    _, decoder, params = build(llama, settings, threshold, moved=0.0)
    found, exits = text(decoder, params)
    assert found == expected
    assert exits == [exit_number] * 12
    _, decoder, params = build(llama, settings, threshold, moved=1.0)
    assert (text(decoder, params)[0] == expected) == (exit_number == 0)
