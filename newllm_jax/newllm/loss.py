"""Cross-entropy over the targets that are words: what training lowers and perplexity is made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.wikitext import PAD
from newllm_jax.training.step import LossFn, Params, Sums


def next_word_loss(model: ContextVectorLM) -> LossFn:
    """The loss of New-LLM as the update loop wants it: sums over the targets of a batch that are not padding.

    Its batch is `ids [batch, time + 1]`: inputs are `ids[:, :-1]`, targets `ids[:, 1:]`. A key turns dropout on.
    """

    def loss(params: Params, ids: jax.Array, present: jax.Array, key: jax.Array | None) -> Sums:
        ids = ids.astype(jnp.int32)
        rngs = None if key is None else {"dropout": key}
        logits, _ = model.apply({"params": params}, ids[:, :-1], deterministic=key is None, rngs=rngs)  # type: ignore[misc]
        targets = ids[:, 1:]
        counted = (targets != PAD) & present[:, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hits = jnp.argmax(logits, -1) == targets
        return Sums(
            loss=jnp.sum(losses, where=counted), hits=jnp.sum(hits & counted), count=jnp.sum(counted)
        )  # fmt: skip

    return loss
