"""What gets through the layers of New-LLM while it trains: their signal and their gradients, epoch by epoch."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.config import NewLLMConfig
from newllm_jax.newllm.model import ContextVectorLM
from newllm_jax.newllm.recurrence.cell import CellDropout, CellParams, compute_layer, step
from newllm_jax.newllm.tokenizer import PAD
from newllm_jax.newllm.updates import build_training, initial_state, training_model, training_precision
from newllm_jax.newllm.wikitext import load_wikitext
from newllm_jax.training.feed import open_feed
from newllm_jax.training.loop import Pieces, evaluate, run_epoch
from newllm_jax.training.losses import summed_losses
from newllm_jax.training.place import Place
from newllm_jax.training.precision import dot
from newllm_jax.training.step import Params

DIGITS = 5  # of a measure in the file


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Trains a configuration as the library does, and measures its layers before the first update and after each epoch.

    Args:
      task: `config`, `epochs` (how many to train) and `texts` (how many of the validation split are measured; they are
        spread evenly over it, and each is read from an empty context vector).

    Returns:
      The precision of training, the seconds of it all, and for each epoch from 0 the validation perplexity and the
      measures of `layer_measures`, lists of a number a layer.

    Raises:
      NumericalError: the loss is no longer finite.
    """
    started, config = time.monotonic(), NewLLMConfig.from_dict(task["config"])
    precision, data = training_precision(config), load_wikitext(config)
    model = training_model(config, len(data.tokenizer), precision)
    training, optimizer = build_training(config, model, data.steps(config))
    state = initial_state(config, model, optimizer)
    train, validation = (data.split(name, config) for name in ("train", "validation"))
    strict, texts = ContextVectorLM.from_config(config, len(data.tokenizer)), data.examples("validation", config)
    chosen = np.linspace(0, len(texts) - 1, min(task["texts"], len(texts))).round().astype(int)
    ids, pieces = jnp.asarray(texts[chosen].astype(np.int32)), Pieces(data.steps(config))

    def entry(epoch: int, params: Params) -> dict[str, Any]:
        validated = evaluate(training.evaluate, params, validation, config.examples_at_once)
        measured = jax.device_get(layer_measures(strict, params, ids))
        figures = {name: [float(f"{each:.{DIGITS}g}") for each in values] for name, values in measured.items()}
        return {"epoch": epoch, "val_ppl": validated["ppl"], **figures}

    epochs = [entry(0, state.evaluated)]
    for epoch in range(1, task["epochs"] + 1):
        key = jax.random.fold_in(jax.random.key(config.seed), epoch)
        with open_feed(train, config.batch_size, config.seed, epoch) as feed:
            for place in run_epoch(training.updates, Place.start(epoch, state), feed, key, pieces):
                state = place.state
        epochs.append(entry(epoch, state.evaluated))
    return {"precision": precision, "seconds": time.monotonic() - started, "epochs": epochs}


@partial(jax.jit, static_argnums=0)
def layer_measures(model: ContextVectorLM, params: Params, ids: jax.Array) -> dict[str, jax.Array]:
    """Four measures of every hidden layer, each `[L]`, without dropout, over the targets that are not padding.

    With h_l what layer l hands on (in a residual cell the sum so far), and the loss the mean one (nats) per target:

        rms               sqrt(mean of h_l^2), over units, texts and steps
        signal            sqrt(mean of (h_l - m_l)^2), m_l being each unit's mean over texts and steps: the part of h_l
                          that depends on the input, so that rms^2 = signal^2 + mean of m_l^2
        gradient          sqrt(mean of (d loss / d h_l)^2)
        kernel_gradient   norm of d loss / d W_l; W_1 reads the embedding and the context vector

    Args:
      ids: `[B, T + 1]` word ids.
    """
    targets, spec = ids[:, 1:].T, model.spec
    counted = targets != PAD

    def mean_loss(params: Params, probes: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = hidden_layers(model, params, ids[:, :-1], probes)
        head: Any = model.apply({"params": params}, states[:, -1], method="head")
        inputs, kernel, bias = head
        sums = summed_losses(dot(inputs, kernel, spec.precision) + bias, targets, counted)
        return sums.loss / sums.count, states

    probes = jnp.zeros((len(targets), spec.num_layers, len(ids), spec.hidden_dim))
    (d_params, d_states), states = jax.grad(mean_loss, (0, 1), has_aux=True)(params, probes)

    def mean(values: jax.Array) -> jax.Array:
        """Over texts and steps: `[T, L, B, H]` -> `[L, H]`."""
        return jnp.sum(values * counted[:, None, :, None], (0, 2)) / jnp.sum(counted)

    def root_mean_square(values: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(mean(jnp.square(values)), -1))

    cell = d_params["cell"]
    first = jnp.concatenate([d_params["token_in"]["kernel"], cell["context_in_kernel"]])
    kernels = [first, *(cell[f"hidden_{number}_kernel"] for number in range(2, spec.num_layers + 1))]
    return {
        "rms": root_mean_square(states),
        "signal": root_mean_square(states - mean(states)[:, None]),
        "gradient": root_mean_square(d_states),
        "kernel_gradient": jnp.stack([jnp.linalg.norm(kernel) for kernel in kernels]),
    }


def hidden_layers(model: ContextVectorLM, params: Params, ids: jax.Array, probes: jax.Array) -> jax.Array:
    """What every hidden layer hands on at every step of texts `[B, T]`: `[T, L, B, H]`.

    Args:
      probes: like the result; added to it where the next layer, or the output, reads it. A gradient with respect to
        them is one with respect to what the layers hand on.
    """
    spec, cell = model.spec, params["cell"]
    words: Any = model.apply({"params": params}, method=lambda module: module.token_in(module.embed.embedding))
    tokens = words[ids.T]
    weights = CellParams(
        context_in=cell["context_in_kernel"],
        hidden=tuple(
            (cell[f"hidden_{number}_kernel"], cell[f"hidden_{number}_bias"])
            for number in range(2, spec.num_layers + 1)
        ),
        gates=(cell["gates_kernel"], cell["gates_bias"]),
        norm=(cell["norm_scale"], cell["norm_bias"]),
    )  # fmt: skip

    def body(context: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (token, time, probes), results = inputs, list[jax.Array]()

        def layer(number: int, *arguments: jax.Array) -> jax.Array:
            result = compute_layer(spec, time, CellDropout(), number, *arguments)
            if number < spec.num_layers:  # not the gates
                result += probes[number]
                results.append(result)
            return result

        after, _ = step(spec, weights, context, token, time, CellDropout(), layer)
        return after, jnp.stack(results)

    context = model.initial_context(len(ids))
    _, results = jax.lax.scan(body, context, (tokens, jnp.arange(len(tokens)), probes))
    return jnp.cumsum(results, 1) if spec.cell == "residual" else results
